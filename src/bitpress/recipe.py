"""Recipes: YAML, JSON, dicts or modifier objects, read into stages of modifiers. No tensors here.

Every key is checked, and all faults are reported together, each with its place. The forms:

    GPTQModifier: {scheme: W4A16}                       # a modifier alone

    quantization_modifiers:                             # a group of modifiers
      GPTQModifier: {scheme: W4A16}

    sparsity_stage:                                     # stages, run in order
      run_type: oneshot
      sparsity_modifiers:
        SparseGPTModifier: {sparsity: 0.5}

    stages: {any name: {modifiers: [...]}}              # stages of any name

A group is a mapping `{Name: {keys}}` or a list of such. Modifiers outside a stage make the stage "default".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from bitpress.errors import RecipeError, did_you_mean
from bitpress.modifiers import MODIFIERS, Modifier
from bitpress.modifiers.quantization import SchemeModifier

SUFFIXES = (".yaml", ".yml", ".json")
RunType = Literal["oneshot", "train"]
DEFAULT_STAGE = "default"
METADATA = ("version", "args", "metadata")
RUN_TYPES = ("oneshot", "train")
STAGE_SUFFIX, GROUP_SUFFIX = "_stage", "_modifiers"
# modifiers that a size target from outside the recipe is meant for, unless they have one of these keys
WAITING = ("GPTQModifier", "QuantizationModifier")
WAITING_KEYS = {"bits", "scheme", "config_groups"}
FORMS = "a recipe is a mapping of stages or modifiers, such as 'GPTQModifier: {scheme: W4A16}'"


@dataclass(frozen=True)
class Stage:
    """Modifiers that run together, and whether they run one-shot or in training."""

    name: str
    run_type: RunType
    modifiers: tuple[Modifier, ...]


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run."""

    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, source: object, *, bits: float | None = None) -> Recipe:
        """Read a recipe of any form.

        Args:
            bits: a size target for the modifier that quantizes; None: what the recipe says.
            source: a path (.yaml, .yml, .json), a YAML or JSON string, a dict, a Modifier, a list of
                Modifiers or dicts, or a Recipe.

        Raises:
            RecipeError: all faults together.
        """
        if isinstance(source, Recipe):
            return source if bits is None else source.at(bits)
        faults: list[str] = []
        if isinstance(source, str) and "\n" not in source and source.lower().endswith(SUFFIXES):
            source = Path(source)
        if isinstance(source, Path):
            source, faults = _read_file(source.expanduser())
        elif isinstance(source, str):
            source, faults = _read_text(source, "recipe")
        reader = _Reader(faults, bits)
        stages = reader.recipe(source)
        if not stages and not reader.faults:
            reader.faults.append(f"the recipe is empty; {FORMS}")
        if reader.faults:
            raise RecipeError(reader.faults)
        return cls(tuple(stages)) if bits is None else cls(tuple(stages)).at(bits)

    def at(self, bits: float) -> Recipe:
        """The recipe with this size target for its modifier that quantizes.

        Raises:
            RecipeError: there is not one such modifier, or it has its schemes.
        """
        having = [m for stage in self.stages for m in stage.modifiers if isinstance(m, SchemeModifier) and m.claims()]
        if len(having) != 1:
            many = "no modifier that quantizes" if not having else f"{len(having)} modifiers that quantize"
            raise RecipeError(f"bits: the recipe has {many}, and one is to have the size target")
        changed = replace(having[0], bits=bits)  # its checks say what does not go with it
        stages = (
            replace(stage, modifiers=tuple(changed if m is having[0] else m for m in stage.modifiers))
            for stage in self.stages
        )
        return Recipe(tuple(stages))

    def stage(self, name: str | None) -> Stage:
        """The stage of that name, with or without its `_stage`; None means the only one.

        Raises:
            RecipeError: there is no such stage, or None is not enough to choose one.
        """
        names = [stage.name for stage in self.stages]
        if name is None:
            if len(self.stages) == 1:
                return self.stages[0]
            raise RecipeError(f"the recipe has {len(names)} stages, choose one: {', '.join(names)}")
        for alike in (name, name + STAGE_SUFFIX, name.removesuffix(STAGE_SUFFIX)):
            if alike in names:
                return self.stages[names.index(alike)]
        hint = did_you_mean(name, names)
        hint = hint if "Did you mean" in hint else ""
        raise RecipeError(f"stage: '{name}' is not in the recipe. Its stages: {', '.join(names)}.{hint}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `load` makes an equal Recipe; keys at their defaults are left out."""
        keys = [DEFAULT_STAGE + STAGE_SUFFIX if stage.name == DEFAULT_STAGE else stage.name for stage in self.stages]
        if all(key.endswith(STAGE_SUFFIX) for key in keys):
            return {key: _stage_dict(stage) for key, stage in zip(keys, self.stages, strict=True)}
        return {"stages": {stage.name: _stage_dict(stage) for stage in self.stages}}

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def fingerprint(recipe: Recipe) -> str:
    """What tells recipes apart: SHA-256 of the YAML."""
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()


@dataclass
class _Reader:
    """Walks a recipe's data and collects every fault, with its place."""

    faults: list[str] = field(default_factory=list)
    bits: float | None = None  # a size target, for modifiers that would have no scheme without it

    def recipe(self, data: object) -> list[Stage]:
        if data is None:
            return []
        if isinstance(data, Modifier | list | tuple):
            data = {"modifiers": list(data) if isinstance(data, list | tuple) else [data]}
            return self.default_stage(data, places={"modifiers": ""})
        if not isinstance(data, Mapping):
            self.faults.append(f"expected a recipe, got {data!r}; {FORMS}")
            return []
        stages: dict[str, Stage] = {}
        loose: dict[Any, Any] = {}
        order: list[str] = []
        for key, value in data.items():
            if key in METADATA:
                continue
            if key == "stages":
                named = self.mapping(value, "stages")
            elif isinstance(key, str) and key.endswith(STAGE_SUFFIX):
                named = {key: value}
            else:
                order += [] if loose else [DEFAULT_STAGE]
                loose[key] = value
                continue
            for written, body in named.items():
                name = DEFAULT_STAGE if written == DEFAULT_STAGE + STAGE_SUFFIX else str(written)
                place = f"stages.{written}" if key == "stages" else str(written)
                order.append(name)
                self.add(stages, self.stage(name, body, place))
        if loose:
            for stage in self.default_stage(loose, places={}):
                self.add(stages, stage)
        return [stages[name] for name in dict.fromkeys(order) if name in stages]

    def add(self, stages: dict[str, Stage], stage: Stage | None) -> None:
        if stage is None:
            return
        if stage.name in stages:
            self.faults.append(f"{stage.name}: the recipe has two stages of this name")
        stages[stage.name] = stage

    def default_stage(self, body: Mapping[Any, Any], places: Mapping[str, str]) -> list[Stage]:
        stage = self.stage(DEFAULT_STAGE, body, "", places)
        return [] if stage is None else [stage]

    def stage(self, name: str, body: object, where: str, places: Mapping[str, str] | None = None) -> Stage | None:
        """One stage; None if it has faults. `places` renames keys that the user did not write."""
        modifiers: list[Modifier] = []
        run_type: object = None
        before = len(self.faults)
        for key, value in self.mapping(body, where).items():
            place = _join(where, (places or {}).get(key, str(key)))
            if key in METADATA:
                continue
            if key == "run_type":
                run_type = value
                if value not in (None, *RUN_TYPES):
                    hint = did_you_mean(str(value), RUN_TYPES)
                    self.faults.append(f"{place}: {value!r} is unknown.{hint}")
            elif key == "modifiers" or (isinstance(key, str) and key.endswith(GROUP_SUFFIX)):
                modifiers += self.group(value, place)
            elif key in MODIFIERS:
                modifiers += self.modifier(key, value, place)
            else:
                self.faults.append(f"{place}: {_unknown_key(str(key), value, top=not where)}")
        if len(self.faults) > before:
            return None
        if not modifiers and not (where and run_type == "train"):  # plain fine-tuning needs none
            self.faults.append(f"{where}: has no modifiers" if where else f"the recipe is empty; {FORMS}")
            return None
        inferred = "train" if any(m.run_type == "train" for m in modifiers) else "oneshot"
        return Stage(name, cast(RunType, run_type or inferred), tuple(modifiers))

    def group(self, value: object, where: str) -> list[Modifier]:
        """Modifiers of `{Name: {keys}}`, or of a list of such, of names and of objects."""
        if isinstance(value, list | tuple):
            return [m for i, item in enumerate(value) for m in self.group(item, f"{where}[{i}]")]
        if isinstance(value, Modifier):
            return [value]
        if isinstance(value, str):
            value = {value: None}
        found = []
        for name, keys in self.mapping(value, where).items():
            found += self.modifier(str(name), keys, _join(where, str(name)))
        return found

    def modifier(self, name: str, keys: object, where: str) -> list[Modifier]:
        """The modifier in a list, or an empty list if it has faults."""
        if name not in MODIFIERS:
            self.faults.append(f"{where}: {_unknown_modifier(name)}")
            return []
        keys = {} if keys is None else keys
        if not isinstance(keys, Mapping):
            self.faults.append(f"{where}: expected the modifier's keys, got {keys!r}")
            return []
        keys = {str(key): value for key, value in keys.items()}
        if self.bits is not None and name in WAITING and not WAITING_KEYS & keys.keys():
            keys["bits"] = self.bits
        try:
            return [MODIFIERS[name](**keys)]
        except RecipeError as error:
            self.faults += [where + problem.removeprefix(name) for problem in error.problems]
            return []

    def mapping(self, value: object, where: str) -> Mapping[Any, Any]:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return value
        self.faults.append(f"{where or 'recipe'}: expected modifiers by name, got {value!r}")
        return {}


def _stage_dict(stage: Stage) -> dict[str, Any]:
    names = [type(modifier).__name__ for modifier in stage.modifiers]
    settings = [modifier.to_dict() for modifier in stage.modifiers]
    group = stage.name.removesuffix(STAGE_SUFFIX) + GROUP_SUFFIX
    pairs = list(zip(names, settings, strict=True))
    # A mapping holds a name once; a list holds it as often as it runs.
    body = dict(pairs) if len(set(names)) == len(names) else [{name: keys} for name, keys in pairs]
    return {"run_type": stage.run_type, group: body}


def _unknown_modifier(name: str) -> str:
    if name.endswith((STAGE_SUFFIX, GROUP_SUFFIX)):
        return "expected a modifier here, not a stage or a group of modifiers"
    hint = did_you_mean(name, MODIFIERS)
    # `GPTQ` is too short for `GPTQModifier` to be near.
    longer = did_you_mean(name + "Modifier", MODIFIERS)
    return "unknown modifier." + (longer if "Did you mean" in longer and "Known" in hint else hint)


def _unknown_key(key: str, value: object, *, top: bool) -> str:
    """What a key was meant to be, from its own ending and from what it holds."""
    known = ["modifiers", "run_type", *METADATA, *(["stages"] if top else []), *MODIFIERS]
    if key.endswith("Modifier"):
        return _unknown_modifier(key)
    stem, _, ending = key.replace("-", "_").rpartition("_")
    near_stage = "Did you mean" in did_you_mean(ending, ["stage"])
    near_group = "Did you mean" in did_you_mean(ending, ["modifiers"])
    if not stem and (near_stage or near_group):
        return f"unknown key.{did_you_mean(key, known)}"
    meant = stem if stem and (near_stage or near_group) else key
    inner = [str(k) for k in value] if isinstance(value, Mapping) else []
    holds_groups = any(k.endswith(GROUP_SUFFIX) for k in inner)
    holds_modifiers = any(k.endswith("Modifier") for k in inner)
    if top and (near_stage or (holds_groups and not near_group)):
        return f"stages must end in '{STAGE_SUFFIX}'. Did you mean '{meant}{STAGE_SUFFIX}'?"
    if near_group or holds_modifiers:
        return f"groups of modifiers must end in '{GROUP_SUFFIX}'. Did you mean '{meant}{GROUP_SUFFIX}'?"
    return f"unknown key.{did_you_mean(key, known)}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where and key else where or key


def _read_file(path: Path) -> tuple[Any, list[str]]:
    """The data of a recipe file, and its repeated keys as faults.

    Raises:
        RecipeError: the file is missing, of another kind, or not valid.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"{path}: a recipe file ends in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    return _read_json(text, str(path)) if path.suffix.lower() == ".json" else _read_text(text, str(path))


def _read_text(text: str, where: str) -> tuple[Any, list[str]]:
    """The data of YAML (or JSON) text, and its repeated keys as faults.

    Raises:
        RecipeError: the text is not valid; names `where`, line and column.
    """
    if text.lstrip().startswith("{"):
        # JSON may be indented by tabs, which YAML refuses; `{a: b}` is YAML.
        try:
            return _read_json(text, where)
        except RecipeError:
            pass
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise RecipeError(f"{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
    return data, [f"{where}, line {line}: the key '{key}' is there twice" for key, line in loader.repeated]


def _read_json(text: str, where: str) -> tuple[Any, list[str]]:
    """As `_read_text`, for JSON alone."""
    faults: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = dict.fromkeys(key for key in keys if keys.count(key) > 1)
        faults.extend(f"{where}: the key '{key}' is there twice" for key in repeated)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique), faults
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}, column {error.colno}"
        raise RecipeError(f"{place}: not valid JSON: {error.msg}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that remembers the keys which YAML would drop in silence."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    self.repeated.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return super().construct_mapping(node, deep)
