"""Triton kernels against the pure functions: through Triton's interpreter where there is no GPU (see conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")

from bitpress.math import sparsegpt
from bitpress.math.descent import descend, descend_by_kernel
from bitpress.math.grid import Grid, QParams, dequantize
from bitpress.math.kernels import pruning
from bitpress.math.masks import Structure, holds
from bitpress.math.scales import find_qparams
from bitpress.math.sweep import inverse_factors, sweep, sweep_by_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = {
    "int4 group": {"bits": 4, "symmetric": True, "group_size": 4},
    "int3 channel asym": {"bits": 3, "symmetric": False, "group_size": None},
    "e2m1 group": {"bits": 4, "symmetric": True, "group_size": 4, "values": "e2m1"},
    "e4m3 channel": {"bits": 8, "symmetric": True, "group_size": None, "values": "e4m3"},
}


def problem(rows, columns, grid, condition):
    generator = torch.Generator().manual_seed(columns + rows)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix *= torch.logspace(0, -condition, columns)
    x = torch.randn(3 * columns, columns, generator=generator) @ mix
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    weight = torch.randn(rows, columns, generator=generator)
    groups = torch.arange(columns) // (grid.group_size or columns)
    return weight, gram, find_qparams(weight, grid, gram.diagonal(), search=True), groups


@pytest.mark.parametrize(
    ("rows", "columns", "condition", "pruned"),
    [(5, 8, 0, False), (5, 8, 3, True), (17, 20, 0, True), (17, 20, 3, False)],
)
@pytest.mark.parametrize("kind", GRIDS)
def test_the_same_codes_as_the_pure_walk(kind, rows, columns, condition, pruned, monkeypatch):
    if DEVICE == "cpu":  # the interpreter is slow: a block of two strips, then half a strip
        monkeypatch.setattr("bitpress.math.kernels.columns.COLUMNS", 16)
        monkeypatch.setattr("bitpress.math.kernels.columns.STRIP", 8)
    grid = Grid(per_tensor=False, scale_dtype=torch.bfloat16, **GRIDS[kind])
    weight, gram, qparams, groups = problem(rows, columns, grid, condition)
    keep = (weight.abs() > 0.3) if pruned else None
    factor = inverse_factors(gram)[0]
    codes = sweep(weight, factor, qparams, groups, grid, 64, keep)
    moved = [None if t is None else t.to(DEVICE) for t in (weight, factor, groups, keep)]
    found = sweep_by_kernel(moved[0], moved[1], qparams.to(DEVICE), moved[2], grid, moved[3]).cpu()
    assert found.dtype == grid.code_dtype
    # sums in another order may take a weight that lies on the edge to the other side
    assert (found.float() == codes.float()).float().mean() > 0.995
    better = descend(weight, codes, gram, qparams, groups, grid, 64, passes=2, keep=keep)
    args = (moved[0], codes.to(DEVICE), gram.to(DEVICE), qparams.to(DEVICE), moved[2], grid)
    found = descend_by_kernel(*args, passes=2, keep=moved[3]).cpu()
    assert (found.float() == better.float()).float().mean() > 0.995
    assert not torch.equal(better.float(), codes.float()) or columns == 8


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize(
    ("structure", "rows", "columns", "condition"),
    [
        ("2:4", 5, 8, 0),
        ("1:2", 9, 22, 2),
        ("2:4", 17, 40, 3),
        ("3:8", 5, 24, 0),
        ("8:16", 3, 32, 0),
        (None, 17, 20, 0),
        (None, 5, 40, 3),
    ],
)
def test_the_same_masks_as_the_pure_sweep_of_sparsegpt(structure, rows, columns, condition, preserve, monkeypatch):
    """2:4 and 3:8 by sets of weights, 8:16 and what preserves zeros by scores, the others in blocks."""
    if DEVICE == "cpu":
        monkeypatch.setattr("bitpress.math.kernels.pruning.COLUMNS", 16)
        monkeypatch.setattr("bitpress.math.kernels.pruning.STRIP", 16 if structure == "8:16" else 8)
    weight, gram, _, _ = problem(rows, columns, Grid(4, True, None, False, torch.bfloat16), condition)
    if preserve:
        weight[:, ::3] = 0
    pattern = structure and Structure(*map(int, structure.split(":")))
    heights, gone = [rows - 2, 2], weight == 0 if preserve else None
    expected = sparsegpt.prune_in_order(weight, heights, gram, 0.6, pattern, 12, gone)
    monkeypatch.setattr(sparsegpt, "_sweep_of", lambda *_: pruning.prune)
    moved = None if gone is None else gone.to(DEVICE)
    found = sparsegpt.prune_in_order(weight.to(DEVICE), heights, gram.to(DEVICE), 0.6, pattern, 12, moved).cpu()
    assert ((found == 0) == (expected == 0)).float().mean() > 0.98
    same = ((found == 0) == (expected == 0)).all(1)  # sums in another order may turn a near tie
    assert same.float().mean() > 0.7
    torch.testing.assert_close(found[same], expected[same], rtol=2e-3, atol=2e-3)
    for part, zeros in zip(found.split(heights), expected.split(heights), strict=True):
        assert int((part == 0).sum()) == int((zeros == 0).sum())
        assert pattern is None or holds(part, pattern)
    assert not preserve or bool((found[weight == 0] == 0).all())


def in_float64(weight, gram, qparams, groups, grid):
    """GPTQ as in the paper, column by column with the inverse updated, in float64."""
    w, inverse, codes = weight.double(), torch.linalg.inv(gram.double()), []
    for j in range(w.shape[1]):
        scale = qparams.effective()[:, groups[j]].double()
        zero = 0.0 if qparams.zero_point is None else qparams.zero_point[:, groups[j]].double()
        code = grid.nearest_(w[:, j] / scale + zero)
        codes.append(code)
        error = (w[:, j] - (code - zero) * scale) / inverse[j, j]
        w = w - error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1.0  # done with
    return torch.stack(codes, 1)


@pytest.mark.parametrize("kind", ["int4 group", "int3 channel asym"])
def test_an_ill_conditioned_problem_against_float64(kind, monkeypatch):
    """The largest eigenvalue of the Gram matrix is a million times the least."""
    if DEVICE == "cpu":
        monkeypatch.setattr("bitpress.math.kernels.columns.COLUMNS", 16)
        monkeypatch.setattr("bitpress.math.kernels.columns.STRIP", 8)
    grid = Grid(per_tensor=False, scale_dtype=torch.bfloat16, **GRIDS[kind])
    weight, _, _, groups = problem(17, 20, grid, 0)
    generator = torch.Generator().manual_seed(1)
    mix = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    gram = ((mix * torch.logspace(0, 6, 20, dtype=torch.float64)) @ mix.T).float()
    assert torch.linalg.cond(gram.double()) > 9e5
    qparams = find_qparams(weight, grid, gram.diagonal(), search=True)
    args = (weight.to(DEVICE), inverse_factors(gram)[0].to(DEVICE), qparams.to(DEVICE), groups.to(DEVICE), grid)
    found = sweep_by_kernel(*args).cpu()
    expected = in_float64(weight, gram, qparams, groups, grid)
    assert (found.double() == expected).float().mean() > 0.98
    lost = []
    for codes in (found, expected):
        delta = dequantize(codes.to(grid.code_dtype), qparams).double() - weight.double()
        lost.append(float(((delta @ gram.double()) * delta).sum()))
    assert lost[0] == pytest.approx(lost[1], rel=0.02)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (17, 136)])
def test_the_losses_of_the_scale_search(kind, rows, columns):
    from bitpress.math.kernels.search import losses_of
    from bitpress.math.scales import _squared_error

    size = None if "channel" in kind else 8
    grid = Grid(per_tensor=False, scale_dtype=torch.bfloat16, **{**GRIDS[kind], "group_size": size})
    weight, gram, _, _ = problem(rows, columns, grid, 3)
    G = grid.groups(columns)
    candidates = [find_qparams(weight, grid, share=share) for share in (1.05, 0.8, 0.5)]
    tried = QParams.stack([c.to(DEVICE) for c in candidates])
    found = losses_of(weight.to(DEVICE), tried, gram.diagonal().to(DEVICE), grid)
    for loss, candidate in zip(found, candidates, strict=True):
        importance = gram.diagonal().reshape(1, G, -1)
        expected = _squared_error(weight.reshape(rows, G, -1), candidate, importance, grid)
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-7)


def test_the_scale_search_of_several_inputs_has_the_importance_of_each():
    from bitpress.math.kernels.search import losses_of

    grid = Grid(per_tensor=False, scale_dtype=torch.bfloat16, **GRIDS["int4 group"])
    weight, gram, _, _ = problem(10, 24, grid, 3)
    tried = QParams.stack([find_qparams(weight, grid, share=share).to(DEVICE) for share in (1.05, 0.8)])
    importance = torch.stack([gram.diagonal(), gram.diagonal().flip(0)]).to(DEVICE)
    found = losses_of(weight.to(DEVICE), tried, importance, grid)
    for i, rows in enumerate((slice(0, 5), slice(5, 10))):
        mine = QParams(tried.scale[:, rows], None)
        expected = losses_of(weight[rows].to(DEVICE), mine, importance[i], grid)
        torch.testing.assert_close(found[:, rows], expected)


@pytest.mark.parametrize(("rows", "groups", "size"), [(5, 3, 16), (70, 2, 64), (3, 1, 128)])
def test_the_normal_equations_of_the_refit(rows, groups, size):
    from bitpress.math.kernels.pairs import normal_matrices

    generator = torch.Generator().manual_seed(rows)
    columns = groups * size
    z = torch.randint(-8, 8, (rows, columns), generator=generator).float()
    x = torch.randn(2 * columns, columns, generator=generator)
    hessian = x.T @ x
    found = normal_matrices(z.to(DEVICE), hessian.to(DEVICE), groups).cpu()
    parts = z.double().reshape(rows, groups, size)
    blocks = hessian.double().reshape(groups, size, groups, size)
    expected = torch.einsum("rgi,gikj,rkj->rgk", parts, blocks, parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_problems_solved_together_come_to_what_each_comes_to_alone(monkeypatch):
    monkeypatch.setattr("bitpress.math.kernels.columns.COLUMNS", 16)
    monkeypatch.setattr("bitpress.math.kernels.columns.STRIP", 16)
    grid = Grid(per_tensor=False, scale_dtype=torch.bfloat16, **GRIDS["int4 group"])
    posed = [problem(rows, 24, grid, 1) for rows in (5, 5)]
    posed[1] = (posed[1][0].flip(0), posed[1][1].flip(0, 1), posed[0][2], posed[1][3].flip(0))
    keep = torch.rand(2, 5, 24, generator=torch.Generator().manual_seed(0)) > 0.2
    weight, gram, groups = (torch.stack([p[i] for p in posed]).to(DEVICE) for i in (0, 1, 3))
    qparams, factor = QParams.stack([p[2].to(DEVICE) for p in posed]), inverse_factors(gram)[0]
    codes = sweep_by_kernel(weight, factor, qparams, groups, grid, keep.to(DEVICE))
    better = descend_by_kernel(weight, codes, gram, qparams, groups, grid, passes=1, keep=keep.to(DEVICE))
    for e in range(2):
        alone = weight[e].cpu(), qparams.of(e).to("cpu"), groups[e].cpu(), grid
        expected = sweep(alone[0], factor[e].cpu(), *alone[1:], 8, keep[e])
        assert (codes[e].cpu() == expected).float().mean() > 0.99
        expected = descend(alone[0], codes[e].cpu(), gram[e].cpu(), *alone[1:], 8, passes=1, keep=keep[e])
        assert (better[e].cpu() == expected).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 128)])
def test_rms_norm_is_that_of_transformers(shape):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from bitpress.math.kernels.forward import rms_norm

    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.rand(shape[-1], generator=generator)
    x = torch.randn(shape, generator=generator)
    found = rms_norm(x.to(DEVICE), norm.weight.detach().to(DEVICE), 1e-5).cpu()
    torch.testing.assert_close(found, norm(x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_with_its_gate(dtype):
    from bitpress.math.kernels.forward import silu_gate

    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(3, 70, generator=generator).to(dtype) for _ in range(2))
    found = silu_gate(gate.to(DEVICE), up.to(DEVICE)).cpu()
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(("heads", "width"), [(3, 8), (1, 12)])
def test_rotary_embedding_is_that_of_transformers(heads, width, turns, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from bitpress.math.kernels.forward import rotate

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, heads, width, generator=generator).to(dtype).transpose(1, 2)  # as attention views it
    cos, sin = (torch.randn(turns, 5, width, generator=generator).to(dtype) for _ in range(2))
    if dtype == torch.float16:  # subnormal products, and some that are too large
        x[0, :, 0] *= 2.0**-12
        cos[:, 0] *= 2.0**-6
        x[1, :, 1] *= 20000
    found = rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE)).cpu()
    assert torch.equal(found, apply_rotary_pos_emb(x, x, cos, sin)[0])
    x[0, 0, 1], x[0, 0, 2, 0], x[0, 0, 2, width // 2] = torch.nan, torch.inf, torch.inf  # what it makes is not hidden
    found = rotate(x.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE)).cpu()
    torch.testing.assert_close(found, apply_rotary_pos_emb(x, x, cos, sin)[0], rtol=0, atol=0, equal_nan=True)


def test_a_silu_that_waits_for_its_gate_is_a_silu_in_all_else():
    from bitpress.fused import _Silu

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(x)
    for use in (
        lambda s: s + 1,
        lambda s: s * 2,
        lambda s: s @ torch.ones(8, 2),
        lambda s: s[1:],
        lambda s: s.chunk(2)[0],
    ):
        assert torch.equal(use(x.as_subclass(_Silu)), use(expected))
        assert type(use(x.as_subclass(_Silu))) is torch.Tensor
    assert x.as_subclass(_Silu).shape == x.shape
    with pytest.raises(NotImplementedError, match="in place"):
        x.as_subclass(_Silu).mul_(2)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize(("pruned", "size"), [(2, 4), (3, 8)])
def test_a_turn_of_the_mask_search(pruned, size, preserve):
    from bitpress.math.kernels.turns import turn
    from bitpress.math.masks import Structure, keep_in_groups

    pattern, generator = Structure(pruned, size), torch.Generator().manual_seed(size)
    free, dual, fixed = (torch.randn(3, 5 * size, generator=generator) for _ in range(3))
    free[0, :size] = dual[0, :size] = 1.0  # all the same: the first ones go
    gone = torch.rand(3, 5 * size, generator=generator) < 0.3 if preserve else None
    found = [t.to(DEVICE, copy=True) for t in (free, dual, fixed, free, free, torch.zeros_like(free) > 0)]
    turn(*found, 0.25, 0.5, pattern=pattern, gone=None if gone is None else gone.to(DEVICE))
    wanted = free + dual / 0.25
    scores = wanted.abs() if gone is None else wanted.abs().masked_fill(gone, -1)
    keep = keep_in_groups(scores, pattern)
    keep = keep if gone is None else keep & ~gone
    wanted = wanted * keep
    assert torch.equal(found[5].cpu(), keep)
    torch.testing.assert_close(found[3].cpu(), wanted)
    torch.testing.assert_close(found[1].cpu(), dual + 0.25 * (free - wanted))
    torch.testing.assert_close(found[4].cpu(), fixed - found[1].cpu() + 0.5 * wanted)
