"""Runs and conversions into every checkpoint format, from the command line and from Python."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bitpress import CheckpointError, ConfigError, PlanError, convert, oneshot
from bitpress.cli import app
from bitpress.inspection import inspect_checkpoint
from bitpress.loading import load_model
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.transformers import SparseAutoModelForCausalLM
from conftest import build, save, token_rows
from helpers import assert_same_tensors, config_of, logits, make_tokenizer, tensors

IGNORED = ["lm_head", "re:.*down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save(build("llama", torch.bfloat16), folder)
    make_tokenizer(folder)
    return folder


def run(base, folder, recipe, format, **options):
    sizes = {"num_calibration_samples": 6, "max_seq_length": 24}
    return oneshot(base, token_rows(), recipe, output_dir=folder, format=format, **sizes, **options).folder


def four(symmetric=True, **keys):
    scheme = "W4A16" if symmetric else "W4A16_ASYM"
    return GPTQModifier(scheme=scheme, group_size=16, ignore=["lm_head"], refine=0, **keys)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_format_is_the_same_model_and_converts_into_the_others(base, tmp_path, symmetric):
    names = ["compressed-tensors", "gptq", "gptq_v2", "awq", "dense"]
    made = {n: run(base, tmp_path / n, four(symmetric), n) for n in names}
    expected = logits(load_model(made["compressed-tensors"], "bfloat16", "cpu"))
    for name, folder in made.items():
        assert torch.equal(logits(load_model(folder, "bfloat16", "cpu")), expected), name
        sizes = json.loads((folder / "report.json").read_text())["totals"]["output_bytes"]
        assert sizes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    for i, source in enumerate(names[:-1]):
        for target in (names[i + 1], names[i - 2]):
            out = convert(made[source], tmp_path / f"{source}-{target}", format=target).folder
            assert_same_tensors(tensors(out), tensors(made[target]))
            assert config_of(out) == config_of(made[target])


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_group_that_fills_the_row_of_some_linears(base, tmp_path, name):
    scheme = QuantizationModifier(scheme="W4A16", group_size=32, ignore=["lm_head"])
    packed, made = (run(base, tmp_path / n, scheme, n) for n in ("compressed-tensors", name))
    assert torch.equal(logits(load_model(made, "bfloat16", "cpu")), logits(load_model(packed, "bfloat16", "cpu")))
    for source in (made, packed):
        other = convert(source, tmp_path / f"from-{source.name}", format="gptq_v2").folder
        assert "dynamic" not in config_of(other)["quantization_config"], source
    back = convert(made, tmp_path / "back", format="compressed-tensors").folder
    assert config_of(back) == config_of(packed)
    assert_same_tensors(tensors(back), tensors(packed))


def test_what_config_and_inspect_say_of_gptq(base, tmp_path):
    recipe = GPTQModifier(scheme="W4A16", group_size=16, actorder="group", ignore=IGNORED)
    folder = run(base, tmp_path / "out", recipe, "gptq")
    settings = config_of(folder)["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == settings
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True, "lm_head": False}
    assert {k: settings[k] for k in wanted} == wanted
    assert settings["checkpoint_format"] == "gptq"
    assert list(settings["dynamic"]) == [f"-:^model\\.layers\\.{i}\\.mlp\\.down_proj$" for i in range(2)]
    inside = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    assert settings["modules_in_block_to_quantize"] == [inside]
    found = inspect_checkpoint(folder)
    assert (found.method, found.format, len(found.layers)) == ("gptq", "gptq", 12)
    assert {(x.scheme, x.symmetric, x.group_size) for x in found.layers} == {("W4A16 g16", True, 16)}


def test_linears_that_clients_fuse_are_also_named_together(base, tmp_path):
    eight = {"targets": ["re:.*(gate|up)_proj"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}
    rest = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}
    recipe = QuantizationModifier(config_groups={"a": eight, "b": rest}, ignore=["lm_head"])
    folder = run(base, tmp_path / "out", recipe, "gptq")
    dynamic = config_of(folder)["quantization_config"]["dynamic"]
    assert dynamic["+:^model\\.layers\\.0\\.mlp\\.gate_up_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    packed = run(base, tmp_path / "packed", recipe, "compressed-tensors")
    assert torch.equal(logits(load_model(folder, "auto")), logits(load_model(packed, "auto")))
    assert_same_tensors(
        tensors(convert(folder, tmp_path / "back", format="compressed-tensors").folder), tensors(packed)
    )
    with pytest.raises(PlanError, match="holds 4-bit integers only, not int8"):
        run(base, tmp_path / "awq", recipe, "awq")


def test_groups_of_the_act_order_from_disk_and_in_memory(base, tmp_path):
    recipe = four(actorder="group")
    folder = run(base, tmp_path / "out", recipe, "gptq")
    stored = tensors(folder)
    g_idx = stored["model.layers.0.mlp.down_proj.g_idx"]
    assert sorted(g_idx.tolist()) == sorted(c // 16 for c in range(64)) and not torch.equal(g_idx, g_idx.sort().values)
    model = build("llama", torch.bfloat16)
    oneshot(model, token_rows(), recipe, format="gptq", num_calibration_samples=6, max_seq_length=24)
    model.save_pretrained(tmp_path / "memory")
    assert_same_tensors(tensors(tmp_path / "memory"), stored)
    again = SparseAutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(tmp_path / "again"), stored)
    for target, why in (("compressed-tensors", "actorder: 'group' needs the GPTQ format"), ("awq", "adjacent columns")):
        with pytest.raises(PlanError, match=why):
            convert(folder, tmp_path / target, format=target)
        assert not (tmp_path / target).exists()
    with pytest.raises(PlanError, match="needs the GPTQ format"):
        again.save_pretrained(tmp_path / "packed", quantization_format="compressed-tensors")


def changed(folder, out, change, **settings):
    """A copy of a GPTQ checkpoint with other tensors, or other words about them."""
    shutil.copytree(folder, out)
    found = tensors(folder)
    change(found)
    for file in out.glob("*.safetensors"):
        file.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(found, out / "model.safetensors")
    config = config_of(folder)
    config["quantization_config"] |= settings
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_groups_are_told_by_where_columns_lie_not_by_the_flag(base, tmp_path):
    recipe = QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"])
    packed = run(base, tmp_path / "packed", recipe, "compressed-tensors")
    flagged = changed(run(base, tmp_path / "gptq", recipe, "gptq"), tmp_path / "flag", lambda t: None, desc_act=True)
    assert_same_tensors(
        tensors(convert(flagged, tmp_path / "back", format="compressed-tensors").folder), tensors(packed)
    )
    rows = QuantizationModifier(scheme="W4A16", group_size=-1, ignore=["lm_head"])
    whole = changed(run(base, tmp_path / "rows", rows, "gptq"), tmp_path / "whole", lambda t: None, desc_act=True)
    assert torch.equal(
        logits(load_model(convert(whole, tmp_path / "awq", format="awq").folder)), logits(load_model(whole))
    )


def test_a_damaged_source_is_said_with_the_tensor(base, tmp_path):
    folder = run(
        base, tmp_path / "out", QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"]), "gptq"
    )
    linear = "model.layers.0.mlp.up_proj"
    cases = {
        f"'{linear}.g_idx' is missing": lambda t: t.pop(f"{linear}.g_idx"),
        f"'{linear}.g_idx' names groups that are not there": lambda t: t[f"{linear}.g_idx"].fill_(99),
        f"{linear}: NaN or infinity in the scales": lambda t: t[f"{linear}.scales"].fill_(float("nan")),
    }
    for i, (why, change) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=why):
            convert(changed(folder, tmp_path / str(i), change), tmp_path / f"to{i}", format="awq")


def test_a_quantized_head_is_said(base, tmp_path):
    recipe = QuantizationModifier(scheme="W4A16", group_size=16, ignore=[])
    for format in ("gptq", "awq"):
        folder = run(base, tmp_path / format, recipe, format)
        assert config_of(folder)["quantization_config"]["lm_head"] is True
        notes = json.loads((folder / "report.json").read_text())["notes"]
        assert any("leaves a quantized output head random" in note for note in notes)


def test_two_stages_hand_groups_on(base, tmp_path):
    recipe = """
    first_stage:
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16, group_size: 16, actorder: group, targets: ["re:.*self_attn.*"]}
    second_stage:
      quantization_modifiers:
        GPTQModifier: {scheme: W4A16_ASYM, group_size: 16, targets: ["re:.*mlp.*"]}
    """
    folder = run(base, tmp_path / "out", recipe, "gptq")
    settings = config_of(folder)["quantization_config"]
    assert settings["checkpoint_format"] == "gptq_v2" and settings["desc_act"] is True
    assert {x.symmetric for x in inspect_checkpoint(folder).layers} == {True, False}
    assert tensors(folder)["model.layers.0.self_attn.q_proj.g_idx"].tolist() != [c // 16 for c in range(32)]
    dense = convert(folder, tmp_path / "dense", format="dense").folder
    assert torch.equal(logits(load_model(folder, "auto")), logits(load_model(dense, "auto")))


def test_a_size_target_takes_what_the_format_holds(base, tmp_path):
    folder = run(base, tmp_path / "out", None, "gptq", bits=6.0)
    assert {x.symmetric for x in inspect_checkpoint(folder).layers} == {True}
    with pytest.raises(PlanError, match="awq: has one scheme for all linears, and bits chooses several"):
        run(base, tmp_path / "awq", None, "awq", bits=6.0)


@pytest.mark.parametrize(
    ("recipe", "format", "why"),
    [
        ({"QuantizationModifier": {"scheme": "W8A8", "ignore": "lm_head"}}, "gptq", "holds weights only"),
        ({"QuantizationModifier": {"scheme": "NVFP4A16", "ignore": "lm_head"}}, "awq", "holds 4-bit integers only"),
        ({"QuantizationModifier": {"scheme": "W3A16", "group_size": 32, "ignore": "lm_head"}}, "gptq", "16 x 32"),
        ({"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "actorder": "group"}}, "awq", "adjacent columns"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_any_work(base, tmp_path, recipe, format, why):
    with pytest.raises(PlanError, match=why):
        run(base, tmp_path / "out", recipe, format)
    assert not (tmp_path / "out").exists()


def test_tuning_needs_adjacent_groups(base, tmp_path):
    recipe = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "actorder": "group", "ignore": "lm_head"}}
    with pytest.raises(PlanError, match="TuneModifier needs groups of adjacent columns"):
        run(base, tmp_path / "out", recipe | {"TuneModifier": {"iters": 1}}, "gptq")


def test_the_command_line(base, tmp_path):
    runner = CliRunner()
    common = ["--scheme", "W4A16", "--group-size", "16", "--method", "rtn"]
    done = runner.invoke(app, ["oneshot", str(base), *common, "--format", "gptq", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "awq"), "--format", "awq"])
    assert done.exit_code == 0 and "awq" in done.output
    done = runner.invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "awq"), "--format", "awq"])
    assert done.exit_code == 0 and inspect_checkpoint(tmp_path / "awq").method == "awq"
    for arguments, why in (
        (["convert", str(tmp_path / "out"), str(tmp_path / "x"), "--format", "gtpq"], "Did you mean 'gptq'"),
        (["convert", str(base), str(tmp_path / "x"), "--format", "gptq"], "is not quantized"),
        (["convert", str(tmp_path / "out"), str(tmp_path / "out"), "--format", "awq"], "own folder"),
        (["convert", str(tmp_path / "no"), str(tmp_path / "x"), "--format", "awq"], "no such"),
        (["convert", str(tmp_path / "out"), str(tmp_path / "awq"), "--format", "dense"], "other arguments (format)"),
        (["plan", str(base), *common, "--format", "gtpq"], "Did you mean 'gptq'"),
        (["plan", str(base), *common, "--format", "gptq", "--dense"], "drop one"),
    ):
        failed = runner.invoke(app, arguments)
        assert failed.exit_code == 1 and why in str(failed.exception), arguments
        assert not (tmp_path / "x").exists()


def test_a_conversion_that_was_killed_goes_on(base, tmp_path, monkeypatch):
    folder = run(base, tmp_path / "out", four(), "compressed-tensors")
    whole = convert(folder, tmp_path / "whole", format="gptq").folder
    from bitpress.output import Output

    write, calls = Output.write, []

    def dies(self, shard, *args, **options):
        if shard == 1 and not calls:
            calls.append(shard)
            raise KeyboardInterrupt
        write(self, shard, *args, **options)

    monkeypatch.setattr(Output, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "cut", format="gptq")
    assert inspect_checkpoint(tmp_path / "cut").method == "unfinished"
    convert(folder, tmp_path / "cut", format="gptq")
    assert_same_tensors(tensors(tmp_path / "cut"), tensors(whole))


def test_activations_do_not_survive_in_plain_weights(base, tmp_path):
    recipe = {"QuantizationModifier": {"scheme": "W8A8", "ignore": "lm_head"}}
    folder = run(base, tmp_path / "out", recipe, "compressed-tensors")
    with pytest.raises(PlanError, match="holds weights only, and this scheme rounds inputs too"):
        convert(folder, tmp_path / "gptq", format="gptq")
    dense = convert(folder, tmp_path / "dense", format="dense").folder
    assert "inputs are not rounded" in json.loads((dense / "report.json").read_text())["notes"][0]
    assert inspect_checkpoint(dense).method == "dense"


def test_experts_and_zero_points_convert(tmp_path):
    base = save(build("qwen3_moe", torch.bfloat16), tmp_path / "base")
    recipe = QuantizationModifier(scheme="W4A16_ASYM", group_size=16, ignore=["lm_head", "re:.*mlp.gate$"])
    folder = run(base, tmp_path / "out", recipe, "compressed-tensors")
    out = convert(folder, tmp_path / "gptq", format="gptq").folder
    assert torch.equal(logits(load_model(folder, "auto")), logits(load_model(out, "auto")))
    assert "-:^model\\.layers\\.0\\.mlp\\.gate$" in config_of(out)["quantization_config"]["dynamic"]
    with pytest.raises(ConfigError, match="unknown"):
        convert(folder, tmp_path / "x", format="gguff")
