"""The same run on a GPU: the same answers as on the CPU, within rounding; and memory stays bounded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensor

from bitpress import oneshot, train
from bitpress.ahead import Ahead
from bitpress.checkpoint import Source, on_device, write_shard
from bitpress.errors import PlanError
from bitpress.formats import bits
from bitpress.math.gptq import gptq
from bitpress.math.grid import Grid
from bitpress.math.masks import Structure, holds
from bitpress.math.stats import GramAccumulator
from bitpress.subject import FolderSubject
from bitpress.training import masks
from bitpress.transformers import SparseAutoModelForCausalLM
from bitpress.verified import mismatch
from conftest import FAMILIES, build, save, token_rows
from helpers import tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
RECIPE = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [7, 512, 1100])
def test_gram(dtype, channels):
    torch.manual_seed(channels)
    x = torch.randn(3, 1000, channels, device="cuda").to(dtype)
    sums = GramAccumulator(channels, x.device)
    for part in x:
        sums.add(part)
    flat = x.double().reshape(-1, channels)
    wanted = flat.T @ flat
    assert (sums.finish().gram.double() - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_gptq_equals_the_cpu():
    torch.manual_seed(0)
    x = torch.randn(4096, 256) @ torch.randn(256, 256) * torch.rand(256)
    weights = [torch.randn(384, 256), torch.randn(64, 256)]
    results = []
    for device in ("cpu", "cuda"):
        sums = GramAccumulator(256, torch.device(device))
        sums.add(x.to(device))
        grid = Grid(4, False, 64, False, torch.bfloat16)
        results.append(gptq([w.to(device) for w in weights], sums.finish(), grid))
    for cpu, cuda in zip(*results, strict=True):
        assert (cpu.codes == cuda.codes.cpu()).float().mean() > 0.995
        assert float(cuda.error) == pytest.approx(float(cpu.error), rel=0.02)


@pytest.mark.parametrize("width", range(2, 9))
def test_packing(width):
    codes = torch.randint(-(1 << (width - 1)), 1 << (width - 1), (9, 131), dtype=torch.int8)
    assert torch.equal(bits.pack(codes.cuda(), width).cpu(), bits.pack(codes, width))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run(family, tmp_path):
    base = save(build(family, torch.bfloat16), tmp_path / "base")
    reports = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        oneshot(
            base, token_rows(), RECIPE, output_dir=out, max_seq_length=32, num_calibration_samples=12, device=device
        )
        reports[device] = json.loads((out / "report.json").read_text())
    assert Source(tmp_path / "cpu").tensors.keys() == Source(tmp_path / "cuda").tensors.keys()
    assert reports["cuda"]["totals"]["peak_device_bytes"] > 0
    for cpu, cuda in zip(reports["cpu"]["layers"], reports["cuda"]["layers"], strict=True):
        assert cuda["rel_error"] == pytest.approx(cpu["rel_error"], rel=0.35, abs=1e-4), cpu["name"]


def test_blocks_finished_beside_the_next_one_are_the_same(tmp_path, monkeypatch):
    from bitpress import plan

    base = save(build("llama", torch.bfloat16, num_hidden_layers=6), tmp_path / "base")
    real, tensors = plan.budget, {}
    for beside in (True, False):
        monkeypatch.setattr(plan, "budget", lambda *a, _as=beside, **k: {**real(*a, **k), "solves_beside": _as})
        out = tmp_path / str(beside)
        options = {"max_seq_length": 32, "num_calibration_samples": 12, "device": "cuda", "propagate": False}
        oneshot(base, token_rows(), RECIPE, output_dir=out, **options)
        tensors[beside] = Source(out).read(Source(out).tensors)
    assert tensors[True].keys() == tensors[False].keys()
    assert all(torch.equal(t, tensors[False][n]) for n, t in tensors[True].items())


@pytest.mark.parametrize("recipe", [RECIPE, {"QuantizationModifier": {"scheme": "FP8_DYNAMIC"}}], ids=["gptq", "fp8"])
def test_weights_copied_ahead_are_the_same(recipe, tmp_path, monkeypatch):
    from bitpress import plan

    base = save(build("llama", torch.bfloat16, num_hidden_layers=6), tmp_path / "base")
    real, tensors, take, copied = plan.budget, {}, Ahead.take, []

    def seen(self, prefix, device):
        found = take(self, prefix, device)
        copied.append(found is not None and all(t.is_cuda for t in found.values()))
        return found

    def late(self, prefix, onto):  # as if the copies took long
        if onto is not None:
            self._stream = self._stream or torch.cuda.Stream(onto)
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(50_000_000)
        return fetch(self, prefix, onto)

    fetch = Ahead._fetch
    monkeypatch.setattr(Ahead, "take", seen)
    monkeypatch.setattr(Ahead, "_fetch", late)
    for ahead in (True, False):
        copied.clear()
        monkeypatch.setattr(plan, "budget", lambda *a, _as=ahead, **k: {**real(*a, **k), "copies_ahead": _as})
        out = tmp_path / str(ahead)
        options = {"max_seq_length": 32, "num_calibration_samples": 12, "device": "cuda"}
        oneshot(base, token_rows(), recipe, output_dir=out, **options)
        tensors[ahead] = Source(out).read(Source(out).tensors)
        assert sum(copied) == (5 if ahead else 0)  # all but the first block
    assert all(torch.equal(t, tensors[False][n]) for n, t in tensors[True].items())


@pytest.mark.parametrize("times", [1, 1.5])
@pytest.mark.parametrize(
    "recipe", [RECIPE, {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4"}}], ids=["gptq", "sparsegpt"]
)
def test_max_memory_holds(recipe, times, tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape["max_position_embeddings"] = 512
    base = save(build("llama", torch.bfloat16, num_hidden_layers=3, **shape), tmp_path / "base")
    rows = [{"input_ids": [(7 * i + j) % 90 for j in range(512)]} for i in range(128)]
    options = {"max_seq_length": 512, "num_calibration_samples": 128, "device": "cuda"}
    with pytest.raises(PlanError, match="raise --max-memory") as refused:
        oneshot(base, rows, recipe, output_dir=tmp_path / "out", max_memory="1MiB", **options)
    number, unit = re.search(r"needs ([\d.]+) ([MG]iB)", str(refused.value)).groups()
    limit = int((float(number) + 0.01) * times * (1 << {"MiB": 20, "GiB": 30}[unit]))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    oneshot(base, rows, recipe, output_dir=tmp_path / "out", max_memory=limit, **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["peak_device_bytes"] <= limit


def test_blocks_that_are_not_needed_are_not_read_ahead(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(FolderSubject, "fetch", lambda self, prefix, onto: fetched.append(prefix))
    base = save(build("llama", torch.bfloat16, num_hidden_layers=5), tmp_path / "base")
    recipe = {"GPTQModifier": {**RECIPE["GPTQModifier"], "targets": [r"re:.*layers\.[01]\..*"]}}
    options = {"max_seq_length": 32, "num_calibration_samples": 12, "device": "cuda"}
    oneshot(base, token_rows(), recipe, output_dir=tmp_path / "out", **options)
    assert fetched == ["model.layers.1."]


def test_a_stage_that_hands_on_what_an_earlier_one_solved(tmp_path):
    """A shard then holds linears that were solved on the GPU, and others that were read from the disk."""
    base = save(build("llama", torch.bfloat16), tmp_path / "base")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}

    def stage(pattern):
        group = {"weights": weights, "targets": [pattern]}
        return {"modifiers": {"GPTQModifier": {"config_groups": {"group_0": group}}}}

    recipe = {"first_stage": stage("re:.*self_attn.*"), "second_stage": stage("re:.*mlp.*")}
    options = {"max_seq_length": 32, "num_calibration_samples": 12}
    oneshot(base, token_rows(), recipe, output_dir=tmp_path / "out", device="cuda", **options)
    assert sum(name.endswith("weight_packed") for name in tensors(tmp_path / "out")) == 14


def test_shards_leave_and_come_back_in_few_copies(tmp_path, monkeypatch):
    """The bytes are those of tensors on the CPU, also across the size that is joined."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(33, 7, generator=generator),
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "c": torch.randint(0, 9, (3, 3), generator=generator, dtype=torch.int8),
        "d": torch.tensor(3.0),
        "e": torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn),
        "f": torch.randint(0, 9, (40, 2), generator=generator, dtype=torch.int32).T,
        "g": torch.tensor([40, 2]),
    }
    write_shard(tmp_path / "cpu.safetensors", tensors)
    for joined in (1, 100, 1 << 20):
        monkeypatch.setattr("bitpress.checkpoint.JOINED", joined)
        mixed = {name: t if name == "c" else t.cuda() for name, t in tensors.items()}
        write_shard(tmp_path / "cuda.safetensors", mixed)
        assert (tmp_path / "cuda.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    get = on_device(tmp_path / "cpu.safetensors", torch.device("cuda"))
    for name, tensor in tensors.items():
        back = get(name)
        assert back.is_cuda == (name != "g")  # a shape is read where it lies
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(back.cpu().reshape(-1).view(torch.uint8), flat)


SMOOTHING = {
    "awq": {"AWQModifier": {"scheme": "W4A16_ASYM", "group_size": 16, "ignore": ["lm_head"]}},
    "smoothquant": {"SmoothQuantModifier": {}, "GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}},
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("name", SMOOTHING)
def test_smoothing(name, family, tmp_path):
    base = save(build(family, torch.bfloat16), tmp_path / "base")
    rows = {}
    for device in ("cpu", "cuda"):
        options = {"max_seq_length": 32, "num_calibration_samples": 12, "device": device}
        oneshot(base, token_rows(), SMOOTHING[name], output_dir=tmp_path / device, **options)
        rows[device] = json.loads((tmp_path / device / "report.json").read_text())["layers"]
    for cpu, cuda in zip(rows["cpu"], rows["cuda"], strict=True):
        assert cpu["method"] == cuda["method"] and cpu["method"].startswith(name)
        assert cuda["rel_error"] == pytest.approx(cpu["rel_error"], rel=0.35, abs=1e-4), cpu["name"]


def test_a_model_in_memory_comes_back_to_its_device(tmp_path):
    model = build("llama", torch.bfloat16)
    assert mismatch(model) == 0
    oneshot(model, token_rows(), RECIPE, max_seq_length=32, num_calibration_samples=12, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_norms_are_fused_where_the_kernel_computes_the_same():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from bitpress.fused import fused

    llama = LlamaRMSNorm(256).to("cuda", torch.bfloat16)
    gemma = Gemma2RMSNorm(256).to("cuda", torch.bfloat16)
    for norm in (llama, gemma):
        norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(4, 32, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [llama(x), gemma(x)]
        with fused(torch.nn.ModuleList([llama, gemma])):
            assert "forward" in llama.__dict__ and "forward" not in gemma.__dict__
            found = [llama(x), gemma(x)]
    assert "forward" not in llama.__dict__
    assert (found[0] == expected[0]).float().mean() > 0.99
    torch.testing.assert_close(found[0], expected[0], rtol=2**-7, atol=0)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("small", [True, False])
def test_zeros_stay_while_training(small, tmp_path, monkeypatch):
    """Gradients cut together by their bits, and one by one."""
    if not small:
        monkeypatch.setattr(masks, "SMALL", 0)
    save(build("llama", torch.bfloat16), tmp_path / "base")
    prune = {"MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]}}
    oneshot(tmp_path / "base", None, prune, output_dir=tmp_path / "pruned")
    train(
        tmp_path / "pruned", token_rows(32), {"ConstantPruningModifier": {"targets": "re:.*_proj.weight"}},
        output_dir=tmp_path / "out", max_seq_length=32, per_device_train_batch_size=4, learning_rate=1e-2, bf16=True,
        gradient_accumulation_steps=2, weight_decay=0.1, distill_teacher=tmp_path / "base",
    )  # fmt: skip
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    for name, weight in after.items():
        if name.endswith("_proj.weight"):
            assert holds(weight, Structure(2, 4)) and not (weight[before[name] == 0] != 0).any()
            assert not torch.equal(weight, before[name])


def test_semi_structured_tensors(tmp_path):
    save(build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256), tmp_path / "base")
    recipe = {
        "MagnitudePruningModifier": {"mask_structure": "2:4", "ignore": ["lm_head"]},
        "QuantizationModifier": {"scheme": "W4A16", "group_size": 32, "ignore": ["lm_head"]},
    }
    oneshot(tmp_path / "base", None, recipe, output_dir=tmp_path / "out")
    dense = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out").to("cuda")
    fast = SparseAutoModelForCausalLM.from_pretrained(tmp_path / "out", semi_structured=True)
    assert isinstance(fast.model.layers[0].mlp.up_proj.weight, SparseSemiStructuredTensor)
    ids = torch.arange(2, 34, device="cuda")[None]
    with torch.no_grad():
        wanted, got = dense(input_ids=ids).logits.float(), fast(input_ids=ids).logits.float()
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_gates_and_rotary_embeddings_are_fused_in_a_block():
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as family

    from bitpress import fused

    config = LlamaConfig(hidden_size=128, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    block = family.LlamaDecoderLayer(config, 0).to("cuda", torch.bfloat16)
    x = torch.randn(2, 16, 128, device="cuda", dtype=torch.bfloat16)
    turns = family.LlamaRotaryEmbedding(config).cuda()(x, torch.arange(16, device="cuda")[None])
    own = family.apply_rotary_pos_emb
    with torch.no_grad():
        expected = block(x, position_embeddings=turns)
        with fused.fused(block):
            assert family.apply_rotary_pos_emb is not own and "forward" in block.mlp.act_fn.__dict__
            found = block(x, position_embeddings=turns)
    assert family.apply_rotary_pos_emb is own and "forward" not in block.mlp.act_fn.__dict__
    assert all(fused._same[key] for key in (("silu", torch.bfloat16), (own, 32, torch.bfloat16)))
    first = [t[0] if isinstance(t, tuple) else t for t in (found, expected)]
    assert (first[0] == first[1]).float().mean() > 0.95
    torch.testing.assert_close(*first, rtol=2**-6, atol=2**-7)
