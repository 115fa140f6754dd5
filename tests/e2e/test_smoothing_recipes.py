"""Recipes of AWQ and SmoothQuant: mappings, what is ignored, what is refused, and what is said."""

from __future__ import annotations

import pytest
import torch

from bitpress import PlanError, RecipeError, oneshot
from bitpress.modifiers.awq import AWQMapping, AWQModifier
from bitpress.modifiers.quantization import GPTQModifier, QuantizationModifier
from bitpress.modifiers.smoothquant import SmoothQuantModifier
from conftest import build, save, with_outliers
from helpers import OPTIONS, client, distance, report_of, tensors

W8 = QuantizationModifier(scheme="W8A16", group_size=16, ignore=["lm_head"])
MAPPINGS = {
    "smoothquant's form": [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]],
    "awq's form": [
        {"smooth_layer": "re:.*input_layernorm$", "balance_layers": ["re:.*q_proj$", "re:.*k_proj", "v_proj"]}
    ],
    "part of the readers": [[["q_proj"], "input_layernorm"]],
}


@pytest.mark.parametrize("kind", [SmoothQuantModifier, AWQModifier])
@pytest.mark.parametrize("form", MAPPINGS)
def test_mappings(form, kind, tmp_path, rows):
    model = build("llama")
    base = save(model, tmp_path / "base")
    oneshot(base, rows, [kind(mappings=MAPPINGS[form]), W8], output_dir=tmp_path / "out", **OPTIONS)
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert changed == {f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)}
    methods = {r["name"].rpartition(".")[2]: r["method"] for r in report_of(tmp_path / "out")["layers"]}
    assert methods["q_proj"] == methods["k_proj"] == f"{kind.smoothing}+rtn" and methods["o_proj"] == "rtn"
    assert distance(client(tmp_path / "out", torch.float32), model) < 0.04


def test_mappings_by_names_on_disk_and_as_objects(tmp_path, rows):
    base = save(with_outliers("mixtral"), tmp_path / "base")
    mapping = AWQMapping("re:.*w3$", ["re:.*w2$"])
    oneshot(
        base,
        rows,
        [AWQModifier(mappings=[mapping]), QuantizationModifier(scheme="W4A16", group_size=16, ignore=["lm_head"])],
        output_dir=tmp_path / "out",
        **OPTIONS,
    )
    layers = report_of(tmp_path / "out")["layers"]
    assert {r["name"].rpartition(".")[2] for r in layers if r["method"] == "awq+rtn"} == {"w2"}


def test_ignore_leaves_a_producer_alone(tmp_path, rows):
    base = save(with_outliers(), tmp_path / "base")
    recipe = [SmoothQuantModifier(ignore=["re:.*layernorm"]), QuantizationModifier(scheme="W8A8", ignore=["lm_head"])]
    oneshot(base, rows, recipe, output_dir=tmp_path / "out", **OPTIONS)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert all(torch.equal(before[n], after[n]) for n in before if "norm" in n)
    methods = {r["name"].rpartition(".")[2]: r["method"] for r in report_of(tmp_path / "out")["layers"]}
    assert methods["o_proj"] == methods["down_proj"] == "smoothquant+rtn" and methods["q_proj"] == "rtn"


REFUSED = {
    "matches nothing": (
        "llama", [AWQModifier(mappings=[[["q_proj"], "re:.*inputnorm"]]), W8],
        ["AWQModifier.mappings[0]: 're:.*inputnorm' matches nothing", "input_layernorm"],
    ),
    "reads something else": (
        "llama", [SmoothQuantModifier(mappings=[[["q_proj", "gate_proj"], "input_layernorm"]]), W8],
        ["mappings[0]: 'gate_proj' does not read the output of input_layernorm", "self_attn.q_proj"],
    ),
    "cannot be scaled": (
        "llama", [AWQModifier(mappings=[[["down_proj"], "gate_proj"]]), W8],
        ["mappings[0]: mlp.gate_proj cannot be scaled", "no linear reads it"],
    ),
    "twice": (
        "llama", [AWQModifier(mappings=[[["q_proj"], "input_layernorm"], [["k_proj"], "re:.*input_layer.*"]]), W8],
        ["mappings[1]: input_layernorm is scaled by another mapping already"],
    ),
    "nothing quantizes": ("llama", [AWQModifier()], ["AWQModifier: nothing after it quantizes"]),
    "wrong order": ("llama", [W8, AWQModifier()], ["AWQModifier: must come before QuantizationModifier"]),
    "search without integers": (
        "llama", [SmoothQuantModifier(smoothing_strength="search"), GPTQModifier(scheme="FP8", ignore=["lm_head"])],
        ["SmoothQuantModifier.smoothing_strength: 'search' weighs how inputs are rounded to integers"],
    ),
    "nothing to smooth": (
        "gpt_neox", [SmoothQuantModifier(), QuantizationModifier(scheme="W8A8", targets="re:.*dense_4h_to_h")],
        ["SmoothQuantModifier: nothing in this model can be smoothed", "nothing that reads it is quantized"],
    ),
    "post-norm": (
        "opt", [AWQModifier(mappings=[[["fc1"], "self_attn_layer_norm"]]), W8],
        ["mappings[0]: self_attn_layer_norm cannot be scaled", "something else reads its output too"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case, tmp_path, rows):
    family, recipe, messages = REFUSED[case]
    changes = {"do_layer_norm_before": False} if case == "post-norm" else {}
    base = save(build(family, **changes), tmp_path / "base")
    with pytest.raises(PlanError) as caught:
        oneshot(base, rows, recipe, output_dir=tmp_path / "out", **OPTIONS)
    assert all(m in str(caught.value) for m in messages), str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"smoothing_strength": 1.2}, "smoothing_strength: must be from 0 to 1, got 1.2"),
        ({"smoothing_strength": "much"}, "smoothing_strength: expected a number or 'search', got 'much'"),
        (
            {"smoothing_strength": "search", "algorithm": "log_equalization"},
            "smoothing_strength: 'search' goes with algorithm 'smoothquant'",
        ),
        ({"mappings": []}, "mappings: empty, so nothing would be smoothed"),
        ({"mappings": "q_proj"}, "mappings: expected a list of mappings or null, got 'q_proj'"),
        ({"mappings": [["q_proj"]]}, "mappings[0]: expected [[layers that read], layer that is scaled]"),
        ({"mappings": [[["q_proj"], ["a", "b"]]]}, "mappings[0]: the layer to scale must be one name"),
        ({"mappings": [[[], "norm"]]}, "mappings[0]: the layers that read it must be names"),
        ({"mappings": [{"smooth_layer": "a"}]}, "mappings[0]: balance_layers missing"),
        ({"mappings": [{"smooth_layer": "a", "balance_layers": ["b"], "c": 1}]}, "mappings[0]: unknown key c"),
        ({"mappings": [[["re:("], "norm"]]}, "mappings[0]: 're:(' is not a regular expression"),
        ({"algorithm": "smooth"}, "algorithm: expected 'smoothquant', 'log_equalization'"),
    ],
)
def test_faults_of_smoothquant(keys, fault):
    with pytest.raises(RecipeError) as caught:
        SmoothQuantModifier(**keys)
    assert str(caught.value).startswith(f"SmoothQuantModifier.{fault}"), str(caught.value)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"n_grid": 0}, "n_grid: must be at least 1, got 0"),
        ({"duo_scaling": "some"}, "duo_scaling: expected true or false or 'both' or null, got 'some'"),
        ({"group_size": 64}, "group_size: goes with scheme or config_groups"),
        ({"scheme": "W4A61"}, "scheme: 'W4A61' is unknown. Did you mean 'W4A16'?"),
        ({"n_gird": 3}, "n_gird: unknown key. Did you mean 'n_grid'?"),
    ],
)
def test_faults_of_awq(keys, fault):
    with pytest.raises(RecipeError) as caught:
        AWQModifier(**keys)
    assert str(caught.value).startswith(f"AWQModifier.{fault}"), str(caught.value)


def test_keys_without_effect_are_said(tmp_path, rows):
    base = save(with_outliers(), tmp_path / "base")
    recipe = [
        SmoothQuantModifier(num_calibration_steps=8, ignore=["lm_head", "input_layernormm"]),
        AWQModifier(offload_device="cpu", sequential_targets=["LlamaDecoderLayer"]),
        W8,
    ]
    oneshot(base, rows, recipe, output_dir=tmp_path / "out", **OPTIONS)
    notes = "\n".join(report_of(tmp_path / "out")["notes"])
    for key in ("SmoothQuantModifier.num_calibration_steps", "AWQModifier.offload_device", "sequential_targets"):
        assert f"{key}: has no effect" in notes
    assert "AWQModifier: scales input_layernorm -> self_attn.q_proj" in notes
    assert "SmoothQuantModifier.ignore: 'input_layernormm' matches nothing" in notes and "'lm_head'" not in notes


def test_what_cannot_be_scaled_is_said(tmp_path, rows):
    oneshot(
        save(build("gpt_neox"), tmp_path / "base"),
        rows,
        [AWQModifier(scheme="W4A16", group_size=16, ignore=["lm_head"])],
        output_dir=tmp_path / "out",
        **OPTIONS,
    )
    assert any("the input of mlp.dense_4h_to_h is not scaled" in n for n in report_of(tmp_path / "out")["notes"])


def test_recipes_round_trip(tmp_path):
    from bitpress import Recipe

    text = """
    quant_stage:
      quant_modifiers:
        SmoothQuantModifier:
          smoothing_strength: 0.8
          mappings: [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]
        AWQModifier:
          duo_scaling: both
          mappings: [{smooth_layer: "re:.*v_proj", balance_layers: ["re:.*o_proj"]}]
        GPTQModifier: {scheme: W4A16}
    """
    recipe = Recipe.load(text)
    assert Recipe.load(recipe.to_yaml()) == recipe
