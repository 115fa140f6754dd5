"""What a size target may choose from, as recipes write it. No tensors here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress.errors import RecipeError
from bitpress.modifiers.base import Claim
from bitpress.schemes import UNQUANTIZED, preset

if TYPE_CHECKING:
    from bitpress.modifiers.quantization import SchemeModifier


def read_candidate(entry: Any, where: str, modifier: SchemeModifier) -> tuple[Claim | None, list[str]]:
    """A candidate: a preset, `{scheme: W4A16, group_size: 64}`, `{weights: {...}}` or UNQUANTIZED; and its faults."""
    if isinstance(entry, str) and entry.upper() == UNQUANTIZED:
        return Claim(UNQUANTIZED, ()), []
    if isinstance(entry, str):
        entry = {"scheme": entry}
    if not isinstance(entry, Mapping):
        return None, [f"{where}: expected a preset such as 'W4A16', or its keys, got {entry!r}"]
    if "scheme" not in entry:
        claim, faults = modifier.read_group(where, entry, where)
    else:
        claim, faults = (
            None,
            [f"{where}: {key} does not go with scheme" for key in entry if key not in ("scheme", "group_size")],
        )
        if not faults:
            try:
                claim = modifier.group_of(where, preset(str(entry["scheme"]), entry.get("group_size")))
            except RecipeError as error:
                faults = [f"{where}.{p}" for p in error.problems]
    scheme = getattr(claim, "scheme", None)
    if scheme is not None and scheme.input_activations is not None:
        faults = [*faults, f"{where}: quantizes activations too, which a size target does not choose; use W8A16, W4A16"]
    return (None if faults else claim), faults
