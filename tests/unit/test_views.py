"""Pages from reports made by hand: what is odd in them does not break them, and nothing in them is run."""

from __future__ import annotations

import re

import pytest

from bitpress.views.charts import curve_svg, curve_text
from bitpress.views.page import Cell, answers, table
from bitpress.views.run import place_of, run_page


def row(name, **values):
    base = {
        "name": name, "method": "gptq", "scheme": "W4A16 g128", "rel_error": 0.01, "error_of": "output",
        "bits_per_weight": 4.25, "sparsity": 0.1, "mask": "", "tokens": 64, "policy": "", "seconds": 0.5,
    }  # fmt: skip
    return {**base, **values}


def report(layers, **more):
    totals = {
        "layers": len(layers), "weights": 100, "bits_per_weight": 4.25, "mean_rel_error": 0.01, "sparsity": 0.1,
        "policies": 0, "output_bytes": 1000, "seconds": 3.0, "seconds_by_phase": {"solve": 2.0},
        "peak_bytes_by_phase": {"solve": {"host": 5, "device": 0}}, "peak_host_bytes": 5, "peak_device_bytes": 0,
    }  # fmt: skip
    if not layers:
        totals = {k: v for k, v in totals.items() if k not in ("bits_per_weight", "mean_rel_error", "sparsity")}
    base = {"layers": layers, "totals": totals, "ignored": [], "notes": [], "data": None, "seed": 1,
            "versions": {"bitpress": "0.1.0"}, "run": {}}  # fmt: skip
    return {**base, **more}


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", "12", "q_proj"),
        ("model.layers.3.mlp.experts.7.up_proj", "3", "experts up_proj"),
        ("model.layers.0.self_attn.q_proj+k_proj+v_proj", "0", "q_proj+k_proj+v_proj"),
        ("gpt_neox.layers.1.attention.dense", "1", "dense"),
        ("lm_head", "head", "lm_head"),
    ],
)
def test_where_a_linear_is(name, block, kind):
    assert (place_of(name).block, place_of(name).kind) == (block, kind)


def test_a_run_that_compressed_nothing():
    page = run_page(report([]), "", "out")
    assert "No linear was compressed." in page and "(none)" in page


def test_what_is_in_a_report_is_text():
    bad = "<script>alert(1)</script>"
    layers = [row(f"model.layers.0.{bad}", policy=bad)]
    said = {"answers": [{"prompt": bad, "before": bad, "after": bad + "x"}], "note": bad}
    page = run_page(report(layers, notes=[bad], ignored=[bad], generations=said), f"a: {bad}", bad)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 7


def test_many_experts_take_a_cell_a_block():
    layers = [row(f"model.layers.{b}.mlp.experts.{e}.up_proj") for b in range(40) for e in range(150)]
    page = run_page(report(layers), "", "out")
    cells = re.search(r'<table class="heat short">(.*?)</table>', page, re.DOTALL)[1]
    assert cells.count("<tr>") == 41 and "The first 5,000; report.json has all." in page


def test_errors_are_those_of_the_stage_that_lost_something():
    layers = [
        row("model.layers.0.mlp.up_proj", rel_error=0.25, stage="sparsity_stage", mask="2:4"),
        row("model.layers.0.mlp.up_proj", rel_error=0.0, method="masked", stage="finetuning_stage", mask="2:4"),
    ]
    log = [*({"step": i, "loss": 3.0 - i / 2} for i in range(1, 4)), {"step": 3, "eval_loss": 1.75}]
    data = {"sequences": 8, "source": "list"}
    training = {"steps": 3, "data": data, "metrics": {"train_loss": 2.0}, "log": log}
    page = run_page(report(layers, training=training), "", "out")
    cells = re.search(r'<table class="heat short">(.*?)</table>', page, re.DOTALL)[1]
    assert "25.00%" in cells
    assert '<section id="training">' in page and "3 steps on 8 sequences" in page and "1.75" in page and "<svg" in page


@pytest.mark.parametrize("points", [[(2.0, 0.5)], [(2.0, 0.5), (2.0, 0.5)], [(2, 1.0), (3, 0.1), (4, 0.0)], [(1, 0.0)]])
def test_curves_of_any_points(points):
    svg = curve_svg(points, {"a<b": points[0]}, points[-1], "size", "error")
    assert "a&lt;b" in svg and "nan" not in svg.lower() and "inf" not in svg.lower()
    text = curve_text(points, {"4": points[0]}, points[-1])
    assert "*" in text and len(text.splitlines()) == 16


def test_shares_stay_between_0_and_1():
    made = table(("a", "b"), [("x", Cell("1", 7.0)), ("y", Cell("2", -1.0))])
    assert "--v:100.0%" in made and "--v:0.0%" in made


def test_answers_are_marked_from_where_they_differ():
    made = answers("p", {"before": "abc def", "after": "abc xyz", "same": "abc def", "longer": "abc def ghi"})
    assert re.findall(r"<mark>(.*?)</mark>", made) == ["xyz", " ghi"]
