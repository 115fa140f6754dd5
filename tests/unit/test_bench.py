"""What the GPU benchmark takes for granted of the package."""

import importlib.util
from pathlib import Path

import pytest

import bitpress.math.gptq as solver


@pytest.fixture
def bench():
    file = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_timed_steps_are_there(bench, monkeypatch):
    before = solver.sweep, solver.refit_scales
    with bench.timed({}):
        assert solver.sweep is not before[0] and solver.refit_scales is not before[1]
    assert (solver.sweep, solver.refit_scales) == before
    monkeypatch.setitem(bench.STEPS, "gone", ("bitpress.math.gptq.nothing",))
    with pytest.raises(AttributeError), bench.timed({}):
        pass
    assert (solver.sweep, solver.refit_scales) == before


def test_the_limit_counts_the_products_of_a_block(bench, monkeypatch):
    monkeypatch.setattr(bench, "product_rate", lambda: 1.0)
    tokens, length = 2 * 64, 64
    linears = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # as many as a block has weights
    forward = 2 * tokens * linears + 2 * tokens * length * 4096
    grams = tokens * (3 * 4096**2 + 14336**2)
    assert bench.limit("8b", "gptq", 2, length) == 2 * forward + grams
    assert bench.limit("8b", "fast", 2, length) == forward + grams
    assert bench.limit("8b", "rtn", 2, length) is None
    experts = tokens * 8 * (2048**2 + 768**2)
    dense = bench.limit("moe", "fast", 2, length) - experts
    assert dense > 0 and bench.limit("moe", "gptq", 2, length) < 2 * bench.limit("moe", "fast", 2, length)
