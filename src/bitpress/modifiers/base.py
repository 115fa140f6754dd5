"""What every modifier is: a frozen dataclass whose fields are the YAML keys, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from bitpress.errors import RecipeError, did_you_mean
from bitpress.targets import pattern_fault

if TYPE_CHECKING:  # recipes are read without torch
    from torch import Tensor

    from bitpress.math.masks import Structure
    from bitpress.math.stats import InputStats

CONFIG = ConfigDict(extra="forbid", strict=True)


def plain(value: Any) -> Any:
    """Dicts, lists and scalars of any settings object, copied; what is no such object stays as it is."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-2 as text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


Float = Annotated[float, BeforeValidator(_number)]
Names = Annotated[str | list[str], BeforeValidator(_list)]
Groups = Annotated[dict[str, Any], BeforeValidator(plain)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Modifier:
    """One compression method and its settings.

    Raises:
        RecipeError: all faults of the values together, each starting with class name and key.
    """

    run_type: ClassVar[Literal["oneshot", "train"]] = "oneshot"  # of a stage that does not say its own
    trains: ClassVar[bool] = False  # whether it can be part of a training stage
    # If one of these keys is of the wrong type, the checks across keys would only report echoes of it.
    essential: ClassVar[frozenset[str]] = frozenset()

    def faults(self) -> list[str]:
        """What is wrong with the values, each message starting with its key."""
        return []

    def notes(self) -> list[str]:
        """What is accepted but has no effect, each message starting with its key."""
        return []

    @property
    def surveys(self) -> bool:
        """Whether a pass over the uncompressed model has to come first, to decide what it does."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of the calibration data: "gram", "mean" (of |x|), "range" (min and max), "cache" (range of
        keys and values), "drift" (from the uncompressed model, see `bitpress.math.correct`), "full" (outputs of its
        blocks), "sample" (of its tokens); empty: no data."""
        return frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The keys that differ from their defaults, as plain data for recipe.yaml."""
        out = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value != default:
                out[field.name] = plain(value)
        return out

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise RecipeError([f"{type(self).__name__}.{fault}" for fault in faults])

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Turn pydantic's errors into faults, together with those that the other values have."""
        try:
            return handler(data)
        except ValidationError as error:
            raise RecipeError(cls._problems(data, error.errors())) from None

    @classmethod
    def _problems(cls, data: Any, errors: list[ErrorDetails]) -> list[str]:
        given = dict(data.kwargs or {}) if isinstance(data, ArgsKwargs) else dict(data)
        if isinstance(data, ArgsKwargs) and data.args:
            return [f"{cls.__name__}: give every value by name, not {data.args[0]!r} alone"]
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        bad = {str(error["loc"][0]): error for error in reversed(errors)}
        problems = []
        for key, error in reversed(bad.items()):
            place = f"{cls.__name__}.{key}"
            if error["type"] == "unexpected_keyword_argument":
                problems.append(f"{place}: unknown key.{did_you_mean(key, types)}")
            else:
                problems.append(f"{place}: expected {_readable(types[key])}, got {given.get(key)!r}")
        if not cls.essential & bad.keys():
            try:
                cls(**{key: value for key, value in given.items() if key not in bad})
            except RecipeError as others:
                problems += others.problems
        return problems


@dataclasses.dataclass(frozen=True)
class Claim:
    """Linears that a modifier means together.

    Args:
        name: for messages and groups.
        targets: patterns, see `bitpress.targets`.
    """

    name: str
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LinearModifier(Modifier):
    """A modifier that compresses linears, each on its own: it prunes or quantizes."""

    method: ClassVar[str] = ""
    claims_key: ClassVar[str] = "config_groups"  # where the recipe has its groups
    solves_alone: ClassVar[bool] = False  # its solver moves a switch of the process: no forward may run beside it

    targets: Names = "Linear"
    ignore: Names = dataclasses.field(default_factory=list)

    def claims(self) -> tuple[Claim, ...]:
        """Its linears, in groups of different settings."""
        return (Claim(self.method, names(self.targets)),)

    def leaves(self, claim: Claim) -> bool:
        """Whether a claim names linears that are to stay as they are."""
        return False

    def needs_of(self, claim: Claim) -> frozenset[str]:
        """What it reads of the inputs of the linears of one claim, see `needs`."""
        return self.needs

    def faults(self) -> list[str]:
        found = []
        for key in ("targets", "ignore"):
            found += [f"{key}: {fault}" for fault in map(pattern_fault, names(getattr(self, key))) if fault]
        if not self.targets:
            found.append("targets: empty, so nothing would be compressed")
        return found


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SmoothingModifier(Modifier):
    """A modifier that moves scales between neighbouring modules of a block and leaves the block's output as it is.

    It runs before the stage's modifiers that compress linears.
    """


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class PruningModifier(LinearModifier):
    """A modifier that sets weights to zero."""

    @property
    def corrects(self) -> bool:
        """Whether what it keeps undoes the error of the layers before: a quantizer after it has none to undo."""
        return False

    @property
    def structure(self) -> Structure | None:
        """The N:M structure of its masks, None if there is none."""
        raise NotImplementedError

    def group_columns(self) -> int:
        """Adjacent columns that are pruned together; 1: any number will do."""
        raise NotImplementedError

    def sparsity_at(self, claim: Claim, block: int | None, blocks: int) -> float:
        """The share of zeros of a linear that `claim` means, in decoder block `block` of `blocks` (None: outside).

        Raises:
            PlanError: the claim has none for it.
        """
        raise NotImplementedError

    def prunes(self, rows: int, columns: int, sparsity: float) -> bool:
        """Whether a share of zeros makes at least one weight of (rows, columns) zero."""
        return round(sparsity * rows * columns) > 0

    def prune(self, weights: Sequence[Tensor], stats: InputStats | None, sparsity: float | None) -> list[Tensor]:
        """Prune linears that read the same input.

        Args:
            weights: each (R_i, C) float32; not modified.
            stats: of their common input; None where `needs` is empty.
            sparsity: the step's share of zeros, None: the modifier's own.

        Returns:
            The pruned weights, float32.
        """
        raise NotImplementedError


def names(value: str | list[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def sweep_faults(block_size: int, dampening_frac: float, correct: float) -> list[str]:
    """What is wrong with the numbers that every solver with a sweep has."""
    found = []
    if block_size < 1:
        found.append(f"block_size: must be at least 1 column, got {block_size}")
    if not 0 <= dampening_frac < math.inf:
        found.append(f"dampening_frac: must be 0 or a positive fraction, got {dampening_frac}")
    if not 0 <= correct <= 1:
        found.append(f"correct: must be a share from 0 to 1, got {correct}")
    return found


def _readable(annotation: str) -> str:
    names = {"Float": "a number", "int": "a whole number", "str": "text", "bool": "true or false"}
    names |= {"Names": "a name or a list of names", "Groups": "groups by name", "None": "null"}
    names |= {"Mappings": "a list of mappings", "Candidates": "a list of schemes"}
    names |= {"OrderName": "'none', 'weight', 'static' or 'group'"}
    names |= {"Sparsity": "a share of zeros, a list of them, or a mapping of patterns to either"}
    names |= {"MaskStructure": "'N:M' or 'unstructured'", "dict[str, Any]": "a mapping"}
    if annotation.startswith("Literal["):
        inside, _, rest = annotation.removeprefix("Literal[").partition("]")
        return inside.replace('"', "'") + rest.replace(" | None", " or null")
    parts = [names.get(part, part) for part in annotation.split(" | ")]
    return " or ".join(p[len("Literal[") : -1].replace('"', "'") if p.startswith("Literal[") else p for p in parts)
