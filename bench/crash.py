"""Kills a run with SIGKILL at random moments, resumes it, and compares the result with an uninterrupted run.

python bench/crash.py [--kills 20] [--blocks 6] [--hidden 512] [--samples 32] [--length 256]
    [--seed 0] [--work DIR]

After every kill the output folder must be complete, or have no config.json and be reported unfinished by
`bitpress inspect` (a folder without any file was killed before there was anything to resume). Exit status 1
on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import config_groups
from memory import random_rows, write_llama

BITPRESS = [sys.executable, "-m", "bitpress"]
COMPARED = ("*.safetensors", "model.safetensors.index.json", "config.json", "recipe.yaml")


class Runner:
    """The one command that is started, killed and started again."""

    def __init__(self, work: Path, samples: int, length: int, seed: int) -> None:
        self.options = ["--recipe", str(work / "recipe.json"), "--dataset", str(work / "rows.jsonl")]
        self.options += ["--num-samples", str(samples), "--max-seq-length", str(length)]
        self.options += ["--seed", str(seed)]
        self.model, self.log = work / "model", work / "log.txt"

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = [*BITPRESS, "oneshot", str(self.model), *self.options, "--output", str(out)]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def check(self, process: subprocess.Popen[bytes]) -> None:
        """Stop everything if a run that nobody killed has failed."""
        if process.returncode:
            sys.exit(f"the run failed with {process.returncode}:\n{self.log.read_text()[-3000:]}")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that must be the same."""
    files = sorted({file for pattern in COMPARED for file in folder.glob(pattern)})
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(folder: Path, reference: dict[str, str]) -> list[str]:
    """Names of files that are missing, too many or different."""
    found = digests(folder)
    return sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name))


def state(folder: Path, reference: dict[str, str]) -> tuple[str, bool]:
    """What a killed run has left behind, and whether that is allowed."""
    if not folder.is_dir() or not any(file.is_file() for file in folder.rglob("*")):
        return "nothing written", True
    if (folder / "config.json").exists():
        different = differences(folder, reference)
        return (f"config.json, but {different} differ", False) if different else ("complete", True)
    shards = len(list(folder.rglob("*.safetensors")))
    shown = subprocess.run([*BITPRESS, "inspect", str(folder)], capture_output=True, text=True)
    if "unfinished" in (shown.stdout + shown.stderr).lower():
        return f"unfinished, {shards} shards", True
    return f"inspect does not say unfinished: {(shown.stdout + shown.stderr).strip()[-300:]!r}", False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where the temporary model and outputs go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        faults = crash(Path(folder), args)
    sys.exit(1 if faults else 0)


def crash(work: Path, args: argparse.Namespace) -> int:
    """All runs; returns the number of faults."""
    vocab = 512
    shape = {"hidden": args.hidden, "intermediate": args.hidden * 3, "vocab": vocab}
    write_llama(work / "model", blocks=args.blocks, **shape, seed=args.seed, per_shard=2)
    settings = {"config_groups": config_groups(64, "minmax"), "ignore": ["lm_head"]}
    # JSON is YAML, so this is a recipe file as well.
    (work / "recipe.json").write_text(json.dumps({"GPTQModifier": settings}))
    rows = random_rows(args.samples, args.length, vocab, args.seed)
    (work / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    runner = Runner(work, args.samples, args.length, args.seed)

    # Kills fall between the first sign of the output folder and the last file, config.json; those that fall
    # into Python's imports or into its exit would show nothing.
    start, seen = time.perf_counter(), {}
    process = runner.start(work / "reference")
    while process.poll() is None:
        for sign in ("", "config.json"):
            if sign not in seen and (work / "reference" / sign).exists():
                seen[sign] = time.perf_counter() - start
        time.sleep(0.01)
    runner.check(process)
    first, last = seen.get("", 0.0), seen.get("config.json", time.perf_counter() - start)
    reference = digests(work / "reference")
    if not {"config.json", "recipe.yaml"} <= reference.keys() or not any("safetensors" in n for n in reference):
        sys.exit(f"the uninterrupted run is not complete: it wrote {sorted(reference)}")
    print(f"uninterrupted: output from {first:.1f} s to {last:.1f} s, {len(reference)} files to compare")

    moments = random.Random(args.seed)
    out = work / "out"
    kills = finished = faults = unfinished = 0
    while True:
        # A resumed run has less left to do, so it is killed sooner.
        latest = moments.uniform(first, last) if out.exists() else 1.02 * last
        delay = moments.uniform(0.95 * first, latest)
        process = runner.start(out)
        try:
            # After the last kill the run is left to finish.
            process.wait(timeout=delay if kills < args.kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            what, allowed = state(out, reference)
            faults += not allowed
            unfinished += what.startswith("unfinished")
            print(f"kill {kills:2d} after {delay:6.2f} s: {what}{'' if allowed else '  FAULT'}", flush=True)
            if what != "complete":
                continue
        else:
            runner.check(process)
        finished += 1
        if different := differences(out, reference):
            faults += 1
            print(f"finished run {finished} differs: {', '.join(different)}  FAULT", flush=True)
        if kills >= args.kills:
            break
        shutil.rmtree(out)
    print(f"{kills} kills, {unfinished} of them amid the work, {finished} finished runs, {faults} faults")
    if not unfinished:
        sys.exit("no kill fell amid the work, so nothing was shown: make it longer with --samples or --blocks")
    return faults


if __name__ == "__main__":
    main()
