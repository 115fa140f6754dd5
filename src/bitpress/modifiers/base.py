"""What every modifier is: a frozen dataclass whose fields are the YAML keys, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from bitpress.errors import RecipeError, did_you_mean

CONFIG = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Modifier:
    """One compression method and its settings.

    Raises:
        RecipeError: all faults of the values together, each starting with class name and key.
    """

    run_type: ClassVar[Literal["oneshot", "train"]] = "oneshot"
    # If one of these keys is of the wrong type, the checks across keys would only report echoes of it.
    essential: ClassVar[frozenset[str]] = frozenset()

    def faults(self) -> list[str]:
        """What is wrong with the values, each message starting with its key."""
        return []

    def notes(self) -> list[str]:
        """What is accepted but has no effect, each message starting with its key."""
        return []

    @property
    def needs_stats(self) -> bool:
        """Whether it reads statistics of calibration data."""
        return False

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


def _readable(annotation: str) -> str:
    names = {"Float": "a number", "int": "a whole number", "str": "text", "bool": "true or false"}
    names |= {"Names": "a name or a list of names", "Groups": "groups by name", "None": "null"}
    names |= {"OrderName": "'none', 'weight' or 'static'"}
    if annotation.startswith("Literal["):
        inside, _, rest = annotation.removeprefix("Literal[").partition("]")
        return inside.replace('"', "'") + rest.replace(" | None", " or null")
    return " or ".join(names.get(part, part) for part in annotation.split(" | "))


Float = Annotated[float, BeforeValidator(_number)]
Names = Annotated[str | list[str], BeforeValidator(_list)]
Groups = Annotated[dict[str, Any], BeforeValidator(plain)]
