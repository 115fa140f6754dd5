"""Which linears a stage tunes after they are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitpress.caches import CacheSite
from bitpress.modifiers.base import LinearModifier, Modifier, names
from bitpress.modifiers.tune import TuneModifier
from bitpress.sites import Site
from bitpress.subject import Subject
from bitpress.targets import LinearName, resolve


def find_tuning(
    modifiers: Sequence[Modifier], subject: Subject, sites: Sequence[Site], samples: int
) -> tuple[list[Site], list[str], list[str]]:
    """The sites with what tunes them; faults and notes."""
    tuning = [m for m in modifiers if isinstance(m, TuneModifier)]
    if not tuning:
        return list(sites), [], []
    kind, modifier = TuneModifier.__name__, tuning[0]
    if len(tuning) > 1:
        return list(sites), [f"{kind}: given {len(tuning)} times; the linears of a block are tuned together, once"], []
    place = list(modifiers).index(modifier)
    before = [m for m in modifiers[:place] if isinstance(m, LinearModifier) and m.claims()]
    later = [m for m in modifiers[place:] if isinstance(m, LinearModifier) and m.claims()]
    if later:
        return list(sites), [f"{kind}: must come after {type(later[0]).__name__}, whose result it tunes"], []
    if not before:
        remedy = "put GPTQModifier or another one that quantizes or prunes before it, in the same stage"
        return list(sites), [f"{kind}: nothing before it compresses a linear; {remedy}"], []
    faults, notes = [], []
    if samples < 2:
        faults.append(f"{kind}: needs at least 2 sequences, of which one is held out; raise num_calibration_samples")
    entries = {LinearName(tuple(dict.fromkeys((s.module, s.name))), "Linear"): s for s in sites}
    chosen = resolve(list(entries), names(modifier.targets), names(modifier.ignore), kind)
    faults += chosen.faults if sites else []
    notes += chosen.notes
    mine = {entries[e].module for e in chosen.linears}
    if any(s.block is None and s.module in mine for s in sites):
        notes.append(f"{kind}: the output head is no part of a block and stays as it is solved")
    return (
        [replace(s, tuning=modifier) if s.block is not None and s.module in mine else s for s in sites],
        faults,
        notes,
    )


def without_experts(sites: Sequence[Site]) -> list[Site]:
    """The sites, those of experts not tuned."""
    return [s if s.expert is None else replace(s, tuning=None) for s in sites]


def without_propagation(modifiers: Sequence[Modifier], caches: Sequence[CacheSite]) -> list[str]:
    """What needs the stream of the compressed model."""
    found = [
        f"{type(m).__name__}{what} (part of effort balanced and best): works on the compressed model's stream, which "
        "propagate=False (--no-propagate) and effort fast leave out: drop one of the two"
        for m in modifiers
        for what, asked in ((".correct", getattr(m, "correct", 0)), ("", "full" in m.needs))
        if asked
    ]
    if caches:
        found.append(
            "kv_cache_scheme: its scales are those of the compressed model, which propagate=False (--no-propagate) "
            "and effort fast leave out: drop one of the two"
        )
    return found
