"""What people see of a run and of a comparison, in a real browser, on a phone and a desktop, light and dark."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bitpress import compare, oneshot, scan
from browser import browser, check
from conftest import build, save, token_rows
from helpers import make_tokenizer

PROMPTS = ["w1 w2 w3", "w4 <script>alert(1)</script> w5"]
PRUNED = {
    "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["lm_head"]},
    "GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages")
    make_tokenizer(save(build("llama", torch.bfloat16, num_hidden_layers=4), path / "base"))
    options = {"max_seq_length": 32, "num_calibration_samples": 12}
    oneshot(path / "base", token_rows(), PRUNED, output_dir=path / "out", prompts=PROMPTS, **options)
    compare(path / "base", path / "out", prompts=PROMPTS, text=" ".join(f"w{i}" for i in range(80)), windows=1,
            length=40, html=path / "compare.html")  # fmt: skip
    scan(path / "base", token_rows(), measure="gram", bits=4.6, output_dir=path / "scan", **options)
    return path


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


@pytest.mark.parametrize("name", ["out/report.html", "compare.html", "scan/scan.html"])
def test_pages_are_sound(place, opened, name):
    shots = os.environ.get("BITPRESS_SCREENSHOTS")  # a folder, to look at them
    check(opened, place / name, None if shots is None else Path(shots))


def test_a_report_can_be_read(place, opened):
    page = opened.new_page()
    page.goto((place / "out/report.html").as_uri())
    assert page.locator("h1").inner_text() == "out: how it was compressed"
    page.set_viewport_size({"width": 390, "height": 844})  # a phone has room for all kinds of layers
    wide = page.locator("#layer-by-layer .wide").first.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert wide[0] <= wide[1]
    cells = page.locator("#layer-by-layer table.heat").first.locator("tbody tr")
    assert cells.count() == 4 and cells.first.locator("td").count() == 7
    assert page.locator("#kinds-of-layers tbody tr").count() == 7
    assert "alert(1)" in page.locator("#generations").inner_text()  # told, not run
    assert page.locator("#generations .said").count() == 4
    row = page.locator("#all-layers tbody tr").first
    assert not row.is_visible()
    page.locator("#all-layers summary").first.click()
    assert row.is_visible() and "2:4" in row.inner_text()
    page.close()
