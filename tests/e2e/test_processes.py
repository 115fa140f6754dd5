"""Two processes on the CPU share a run and make what one process makes; one that dies stops it, and it goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import ranked
from bitpress import ConfigError, PlanError, cli, inspect_checkpoint, oneshot, ranks
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import digests, make_tokenizer, tensors

TESTS = Path(__file__).parents[1]


def start(words, launcher=()):
    """Both processes of a program, or a launcher that starts them; exit codes and what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{TESTS}", "COLUMNS": "200"}
    if launcher:
        environments = [own]
        words = [*launcher, f"--master-port={port}", *words]
    else:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [{**own, **shared, "RANK": r, "LOCAL_RANK": r} for r in "01"]
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, words)], env={**os.environ, **extra}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for extra in environments
    ]  # fmt: skip
    wrote = [p.communicate(timeout=300) for p in started]
    return [p.returncode for p in started], wrote


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with what two processes made of every case."""
    place = tmp_path_factory.mktemp("both")
    for family in ("llama", "mixtral"):
        make_tokenizer(save(build(family, torch.bfloat16), place / family))
    codes, wrote = start([TESTS / "ranked.py", place, *ranked.CASES, "memory", "failing"])
    assert codes == [0, 0], wrote
    return place


@pytest.fixture(scope="module")
def told(both):
    return [json.loads((both / f"told-{r}.json").read_text()) for r in "01"]


@pytest.mark.parametrize("case", ranked.CASES)
def test_two_processes_make_what_one_makes(case, both, told, tmp_path, monkeypatch):
    """Within the tolerance that docs/several-gpus.md states."""
    for family in ("llama", "mixtral"):
        (tmp_path / family).symlink_to(both / family)
    sequences = ranked.counted(monkeypatch)
    with monkeypatch.context() as patch:
        ranked.run(case, tmp_path, patch)
    one, two = (json.loads((p / case / "report.json").read_text()) for p in (tmp_path, both))
    assert (one["numerics"]["processes"], two["numerics"]["processes"]) == (1, 2)
    assert (tmp_path / case / "recipe.yaml").read_text() == (both / case / "recipe.yaml").read_text()
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert (a["name"], a["tokens"], a["policy"]) == (b["name"], b["tokens"], b["policy"])
        assert b["rel_error"] == pytest.approx(a["rel_error"], rel=0.01)
    expected, found = (SparseAutoModelForCausalLM.from_pretrained(p / case).state_dict() for p in (tmp_path, both))
    assert expected.keys() == found.keys()
    same = sum(int((expected[k] == found[k]).sum()) for k in expected)
    assert same >= 0.999 * sum(t.numel() for t in expected.values())
    if case in ("gptq", "experts", "caches", "stages"):  # others also run probes, each process alone
        assert told[0][case] == told[1][case] == sequences[0] / 2


def test_a_module_in_memory(both):
    assert inspect_checkpoint(both / "memory").finished
    saved, streamed = tensors(both / "memory"), tensors(both / "gptq")
    name = "model.layers.1.mlp.down_proj.weight_packed"
    assert (saved[name] == streamed[name]).float().mean() > 0.99


def test_faults_are_told_by_all_and_nothing_is_written(both, told):
    few, group, other = told[0]["said"]
    assert told[1]["said"] == told[0]["said"] and not (both / "failing").exists()
    assert few == "PlanError: 2 processes, but 1 calibration sequences: give more, or start fewer (True)"
    assert "not divisible by group_size 7" in group
    assert "processes 0 and 1 have another run to do" in other


@pytest.mark.slow
def test_one_that_dies_stops_the_run_and_it_goes_on(both, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in token_rows()))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(ranked.CASES["gptq"][1]))
    command = [
        "oneshot", both / "llama", "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml",
        "--dataset", tmp_path / "rows.jsonl", "--max-seq-length", "32", "--num-samples", "12", "--device", "cpu",
    ]  # fmt: skip
    codes, wrote = start([TESTS / "ranked.py", tmp_path, "dying", *command])
    assert codes == [1, -9], wrote
    assert "RankError: process 0 of 2: another process of this run has ended" in wrote[0][1]
    assert "start the same command again, it goes on where it was" in wrote[0][1] and "Traceback" not in wrote[0][1]
    assert not (tmp_path / "out/config.json").exists() and (tmp_path / "out/.bitpress/journal.jsonl").is_file()
    with pytest.raises(PlanError, match="cannot go on with the same bits: processes was 2, is 1"):
        oneshot(both / "llama", tmp_path / "rows.jsonl", ranked.CASES["gptq"][1], output_dir=tmp_path / "out",
                device="cpu", **ranked.OPTIONS)  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    codes, wrote = start(["-m", "bitpress", *command], launcher)
    assert codes == [0], wrote
    assert wrote[0][0].count("checkpoint:") == 1 and wrote[0][1].count("going on from there") == 1
    assert digests(tmp_path / "out") == digests(both / "gptq")


def test_who_is_who_must_be_known(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchrun"):
        ranks.join("cpu")
    monkeypatch.setattr(sys, "argv", ["bitpress", "inspect", "folder"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "bitpress inspect is for one process" in capsys.readouterr().err
