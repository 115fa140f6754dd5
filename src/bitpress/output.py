"""The output folder: shards as blocks finish, each read back and compared; then all else, config.json last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitpress import formats, ranks
from bitpress.checkpoint import (
    copy_companions,
    on_device,
    opened,
    read_header,
    read_tensors,
    sync,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from bitpress.errors import CheckpointError, NumericsError
from bitpress.journal import Journal
from bitpress.math.grid import Solved
from bitpress.plan import Plan
from bitpress.report import write_report
from bitpress.sites import Site, stored_spec
from bitpress.subject import Subject
from bitpress.threads import Beside

CPU = torch.device("cpu")
WHOLE = 512 << 20  # bytes of a shard that a GPU takes whole to compare it; a larger one tensor by tensor


class Output:
    """Where a run writes.

    Args:
        folder: the output folder.
        journal: of this run, in the work folder inside.
        shards: number of shards: the blocks and the rest.
        compressed: packed weights; else dense ones beside their scales and zero points.
        verify: read every shard back and compare the weights with what was solved.
        beside: write a shard while the next block is at work; at most one waits.
    """

    def __init__(
        self, folder: Path, journal: Journal, shards: int, *, compressed: bool, verify: bool, beside: bool = False
    ) -> None:
        self.folder, self.journal, self.work = folder, journal, journal.folder
        self.shards, self.compressed, self.verify = shards, compressed, verify
        self._writer = Beside("writer") if beside else None

    def finished(self, shard: int) -> dict[str, Any] | None:
        """The journal's entry of a shard, None if it is not finished."""
        return self.journal.done.get(shard)

    def file(self, shard: int) -> Path:
        """Where a shard lies now: in the work folder, or in its place."""
        name = f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"
        final = self.folder / name
        return final if final.is_file() else self.work / name

    def read_all(self, shard: int, sites: Sequence[Site], device: torch.device = CPU) -> Iterator[Solved]:
        """Solved linears from their shard, one after the other, on the device."""
        file = self.file(shard)
        if device.type == "cuda" and file.stat().st_size <= WHOLE:
            get = on_device(file, device)
            yield from (_solved_of(site, get, compressed=self.compressed) for site in sites)
            return
        with opened(file) as mapped:
            for site in sites:
                yield _solved_of(site, lambda name: mapped(name).to(device, copy=True), compressed=self.compressed)

    def read_others(
        self, shard: int, subject: Subject, prefix: str | None, sites: Sequence[Site]
    ) -> dict[str, torch.Tensor]:
        """The other tensors of a finished shard, by module tensor name: a run may have changed them too."""
        mine = {s.key for s in sites}
        disk = {subject.layout.disk_of[k]: k for k in subject.keys(prefix) if k not in mine}
        file = self.file(shard)
        return {disk[name]: t for name, t in read_tensors((name, file) for name in disk).items()}

    def read_named(self, shard: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors of a finished shard by their names on disk."""
        file = self.file(shard)
        return read_tensors((name, file) for name in names)

    def write(
        self,
        shard: int,
        subject: Subject,
        keys: Sequence[str],
        solved: Sequence[tuple[Site, Solved]],
        rows: list[dict[str, Any]],
        *,
        last: bool,
        changed: Mapping[str, torch.Tensor] | None = None,
        beside: Mapping[str, torch.Tensor] | None = None,
        phases: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a shard: the stored tensors of `keys`, the solved ones in their format. Only the first process does.

        Args:
            changed: tensors that take the place of stored ones, by module tensor name.
            beside: more tensors, by name on disk.
            phases: for the journal, what was spent since the last shard.

        Raises:
            CheckpointError: what is read back is not what was solved, of this shard or of the one before.
        """
        if not ranks.first():
            return
        if self.compressed:
            solved = [
                (s, z if s.scheme is None else formats.as_read(z, s.scheme, s.dtype, s.stored)) for s, z in solved
            ]
        by_key = {site.key: (site, z) for site, z in solved}
        others = dict(changed or {})
        others |= subject.stored(k for k in keys if k not in by_key and k not in others)
        tensors = {subject.layout.disk_of[k]: t for k, t in others.items()}
        for site, z in by_key.values():
            try:
                parts = self._parts(site, z)
            except NumericsError as error:  # what the format cannot hold shows in the numbers alone
                raise NumericsError(f"{site.name}: {error}") from None
            tensors |= {f"{site.name}.{suffix}": t for suffix, t in parts.items()}
        tensors |= beside or {}
        if last:
            tensors |= subject.extra()
        compared = solved if self.verify else ()
        if self._writer is None:
            self._save(shard, tensors, compared, rows, phases or {})
            return
        task = partial(self._save, shard, tensors, compared, rows, phases or {})
        self._writer.start(torch.device("cuda", torch.cuda.current_device()), task)

    def _parts(self, site: Site, z: Solved) -> dict[str, torch.Tensor]:
        """A linear as it is stored, by suffix."""
        if site.scheme is None:
            packed = self.compressed and site.packed_24
            return formats.CHECKPOINTS[site.stored].pack_plain(z.dense()) if packed else {"weight": z.dense()}
        try:
            return formats.pack(z, site.scheme, site.stored) if self.compressed else formats.dense(z, site.scheme)
        except NumericsError as error:
            raise NumericsError(f"{site.name}: {error}") from None

    def settle(self) -> None:
        """Wait for the shard that is being written.

        Raises:
            CheckpointError: what was read back is not what was solved.
        """
        if self._writer is not None:
            self._writer.settle()

    def close(self) -> None:
        """Wait for the shard that is being written, whatever becomes of it."""
        if self._writer is not None:
            self._writer.close()

    def _save(
        self,
        shard: int,
        tensors: dict[str, torch.Tensor],
        compared: Sequence[tuple[Site, Solved]],
        rows: list[dict[str, Any]],
        phases: Mapping[str, Any],
    ) -> None:
        """Write a file, read linears back to compare them, and say in the journal that it is finished."""
        file = self.work / f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"
        write_shard(file, tensors)
        if compared:
            first = compared[0][1]
            device = (first.quantized[0] if first.weight is None else first.weight).device
            pairs = zip(compared, self.read_all(shard, [site for site, _ in compared], device), strict=True)
            # what an earlier stage has solved lies on the CPU
            same = [_equal(z.dense(), back.dense()).to(device) for (_, z), back in pairs]
            for (site, _), equal in zip(compared, torch.stack(same).tolist(), strict=True):
                if not equal:
                    raise CheckpointError(
                        f"{site.name}: the weight read back from {file.name} is not the one that was solved; "
                        "the disk or the packing is at fault, nothing has been completed"
                    )
        sizes = {name: t.numel() * t.element_size() for name, t in sorted(tensors.items())}
        self.journal.add(
            {
                "shard": shard, "file": file.name, "bytes": file.stat().st_size, "tensors": sizes, "rows": rows,
                "phases": phases,
            }
        )  # fmt: skip

    def finish(self, subject: Subject, plan: Plan, recipe: str | None, report: dict[str, Any], tokenizer: Any) -> None:
        """Complete the folder: tokenizer and the rest, report, index, shards in place, config.json, in this order."""
        entries = [self.journal.done[i] for i in range(self.shards)]
        if subject.folder is not None:
            copy_companions(subject.folder, self.folder)
        elif getattr(subject.model, "generation_config", None) is not None:
            subject.model.generation_config.save_pretrained(self.folder)  # type: ignore[union-attr,operator]
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(self.folder)
        if recipe is not None:
            write_text(self.folder / "recipe.yaml", recipe)
        write_report(self.folder, report, recipe or "")
        config, form = self._config(subject, plan), formats.CHECKPOINTS[plan.stored]
        if form.one_file and self.compressed:
            form.complete(self.folder, [self.work / e["file"] for e in entries], subject.config)
            entries = []
        else:
            write_index(self.folder, {e["file"]: e["tensors"] for e in entries})
        for entry in entries:
            if (self.work / entry["file"]).is_file():
                os.replace(self.work / entry["file"], self.folder / entry["file"])
        sync(self.folder)
        for entry in entries:
            read_header(self.folder / entry["file"])
        for name, content in form.files(config.get("quantization_config") or {}).items():
            write_json(self.folder / name, content)
        write_json(self.folder / "config.json", config)
        self.journal.remove()

    def _config(self, subject: Subject, plan: Plan) -> dict[str, Any]:
        if subject.folder is not None:
            config: dict[str, Any] = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
        else:
            config = json.loads(subject.config.to_json_string(use_diff=True))
            config["architectures"] = [type(subject.model).__name__]
        if subject.turned:
            config.pop("torch_dtype", None)
        if subject.turned or ("dtype" not in config and "torch_dtype" not in config):
            config["dtype"] = str(subject.dtype).removeprefix("torch.")
        if subject.tied:
            config["tie_word_embeddings"] = True
        config.pop("quantization_config", None)
        sites = plan.quantized
        if self.compressed:  # linears that are stored by their mask alone are described too
            sites = (*plan.inherited, *(s for s in (*plan.sites, *plan.masked) if s.group or s.packed_24))
        described = sites, plan.ignored, plan.cache_scheme
        if self.compressed:
            settings = formats.CHECKPOINTS[plan.stored].settings(*described)
        else:
            settings = formats.uncompressed_settings(*described)
        return config if settings is None else config | {"quantization_config": settings}


def _equal(solved: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Whether all numbers are the same, one bool: `torch.equal` would wait for the device."""
    if solved.dtype != back.dtype or solved.shape != back.shape:
        return torch.zeros((), dtype=torch.bool)
    return (solved == back.to(solved.device)).all()


def read_site(file_of: Callable[[str], Path], site: Site, *, compressed: bool) -> Solved:
    """A solved linear from the files that hold its tensors, packed or dense beside its scales.

    Raises:
        CheckpointError: a tensor of another size than the linear has.
    """
    names = [f"{site.name}.{suffix}" for suffix in stored_spec(site, compressed=compressed)]
    tensors = read_tensors((name, file_of(name)) for name in names)
    return _solved_of(site, tensors.__getitem__, compressed=compressed)


def _solved_of(site: Site, get: Callable[[str], torch.Tensor], *, compressed: bool) -> Solved:
    """A solved linear from its tensors by name on disk."""
    parts = {}
    for suffix, (_, meant) in stored_spec(site, compressed=compressed).items():
        name = f"{site.name}.{suffix}"
        parts[suffix] = get(name)
        held = parts[suffix].shape
        if held.numel() != math.prod(meant):
            shapes = (" x ".join(map(str, shape)) or "one number" for shape in (held, meant))
            raise CheckpointError(f"{name}: holds {' in place of '.join(shapes)}: download or write it again")
    scheme = site.scheme
    if scheme is None and "positions" in parts:
        zeros = torch.zeros((), dtype=site.dtype, device=parts["values"].device)
        plain = formats.spread(parts["values"], parts["positions"], zeros)
        return Solved(None, None, torch.tensor(float("nan")), weight=plain)
    if scheme is None:
        return Solved(None, None, torch.tensor(float("nan")), weight=parts["weight"])
    return formats.unpack(parts, scheme, site.dtype, site.stored) if compressed else formats.undense(parts, scheme)
