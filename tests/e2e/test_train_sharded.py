"""Training over two processes through Trainer and accelerate: FSDP2 and DDP end with the same bits, killed or not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from bitpress import oneshot
from bitpress.math.masks import Structure, holds
from conftest import build, save
from helpers import assert_same_tensors, conversations, make_tokenizer, tensors

# accelerate shards on devices that it takes for GPUs alone, so it is told that these are some
SCRIPT = """
import os, signal, sys
from accelerate import state
from accelerate.utils import DistributedType
from transformers import TrainerCallback

way, folder, out = sys.argv[1:]
if way == "fsdp":
    made = state.PartialState.__init__

    def init(self, *args, **given):
        made(self, *args, **given)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = init

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        if state.global_step == 5 and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)

from bitpress import train

sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
train(
    folder + "/pruned", folder + "/rows.jsonl", {"ConstantPruningModifier": {"targets": "re:.*_proj.weight"}},
    output_dir=out, max_seq_length=32, per_device_train_batch_size=2, learning_rate=1e-2, max_steps=6, save_steps=3,
    gradient_accumulation_steps=2, weight_decay=0.1, max_grad_norm=0.1, device="cpu", callbacks=[Kill()],
    **(sharding if way == "fsdp" else {}),
)
"""


def run(way, place, out, **more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += [str(place / "script.py"), way, str(place), str(out)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | more, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes(tmp_path):
    make_tokenizer(save(build("llama", torch.bfloat16), tmp_path / "base"))
    oneshot(tmp_path / "base", None, {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}},
            output_dir=tmp_path / "pruned")  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in conversations(64)))
    (tmp_path / "script.py").write_text(SCRIPT)
    for way in ("ddp", "fsdp"):
        done = run(way, tmp_path, tmp_path / way)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "fsdp/checkpoint-6/pytorch_model_fsdp.bin").is_file()  # it was sharded indeed
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "fsdp")
    for name, weight in after.items():
        if name.endswith("_proj.weight"):
            assert holds(weight, Structure(2, 4)) and not (weight[before[name] == 0] != 0).any()
            assert not torch.equal(weight, before[name])
    assert_same_tensors(after, tensors(tmp_path / "ddp"))
    assert run("fsdp", tmp_path, tmp_path / "killed", KILL="1").returncode != 0
    assert not (tmp_path / "killed/config.json").exists()
    again = run("fsdp", tmp_path, tmp_path / "killed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert_same_tensors(tensors(tmp_path / "killed"), after)
