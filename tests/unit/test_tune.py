"""Block tuning: one step as by hand, never worse, masks and grids kept, the same every time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitpress.errors import RecipeError
from bitpress.math.gptq import gptq
from bitpress.math.grid import Grid, Solved, dequantize, quantize, values_of
from bitpress.math.lost import solved
from bitpress.math.masks import Structure, holds, keep_best
from bitpress.math.objective import Divergence, token_weights
from bitpress.math.scales import find_qparams
from bitpress.math.stats import InputStats
from bitpress.math.tune import Settings, Start, ideal_weight, tune, usual_lr
from bitpress.modifiers import TuneModifier
from bitpress.recipe import Recipe

BF16, F32 = torch.bfloat16, torch.float32
GRIDS = {
    "group": Grid(4, True, 8, False, F32),
    "group asym bf16": Grid(3, False, 8, False, BF16),
    "channel": Grid(4, True, None, False, BF16),
    "tensor": Grid(4, True, None, True, F32),
    "tensor asym": Grid(4, False, None, True, F32),
    "fp8 block": Grid(8, True, 8, False, F32, "e4m3", block_rows=4),
    "nvfp4": Grid(4, True, 16, False, BF16, "e2m1", "two-level"),
    "mxfp4": Grid(4, True, 16, False, F32, "e2m1", "power of two"),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block:
    """Two linears with a nonlinearity between. What it is given is a little off, as behind other compressed blocks."""

    def __init__(self, sequences=24, length=32, columns=32, hidden=48):
        mix = normal(columns, columns, seed=1) / columns**0.5
        self.clean = [normal(1, length, columns, seed=10 + i) @ mix for i in range(sequences)]
        drift = 1 + 0.2 * normal(columns, seed=4)
        self.inputs = [x * drift for x in self.clean]
        self.weights = {"up": normal(hidden, columns, seed=2) * 0.3, "down": normal(columns, hidden, seed=3) * 0.3}
        self.lengths = [length] * sequences

    def output(self, weights, picked, inputs=None):
        x = torch.cat([(inputs or self.inputs)[p] for p in picked])
        up, down = (weights[name].to(x.dtype) for name in ("up", "down"))
        return x + torch.nn.functional.silu(x @ up.T) @ down.T

    def target(self, picked):
        return self.output(self.weights, picked, self.clean)

    def grams(self):
        x = torch.cat(self.inputs).reshape(-1, self.inputs[0].shape[-1])
        h = torch.nn.functional.silu(x @ self.weights["up"].T)
        return {"up": x.T @ x, "down": h.T @ h}

    def starts(self, grid, masks=None):
        found = {}
        for name, gram in self.grams().items():
            weight = self.weights[name] if masks is None else self.weights[name] * masks[name]
            (z,) = gptq([weight], InputStats(gram, 1000), grid)
            found[name] = Start(z, grid, ideal_weight(weight, z, gram), None if masks is None else masks[name])
        return found

    def error(self, result):
        dense = {name: z.dense() for name, z in result.items()}
        everything = list(range(len(self.inputs)))
        return float((self.output(dense, everything) - self.target(everything)).square().sum())


FAST = Settings(iters=60, batch_size=4, lr=0.01, scale_lr=0.001, seed=5)


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
def test_one_step_as_by_hand(strategy, asym):
    """A start with some codes one off: a step brings back just those whose column pulls them over the border."""
    R, C, T, B = 6, 16, 12, 8
    grid = Grid(4, not asym, 4 if strategy == "group" else None, strategy == "tensor", F32)
    inputs = [normal(1, T, C, seed=20 + i) for i in range(B)]
    qparams = find_qparams(normal(R, C), grid)
    if strategy == "group" and not asym:
        qparams.scale[:, 1::2] *= -1
    codes = quantize(normal(R, C), qparams, grid)
    weight = dequantize(codes, qparams)
    off = torch.rand(R, C, generator=torch.Generator().manual_seed(1)) < 0.15
    off &= (codes > grid.qmin) & (codes < grid.qmax)
    codes = codes + off.to(torch.int8)
    gram = sum(x[0].T @ x[0] for x in inputs)
    start = solved(weight, codes, qparams, gram)
    exact = Solved(quantize(weight, qparams, grid), qparams, torch.zeros(()))

    def output(weights, picked):
        return torch.cat([inputs[p] for p in picked]) @ weights["w"].T

    settings = Settings(iters=1, batch_size=B - 1, lr=0.1, scale_lr=1e-3, holdout=1 / B, checks=1)
    result = tune(
        {"w": Start(start, grid, ideal_weight(weight, start, gram))},
        output,
        lambda picked: output({"w": exact.dense()}, picked),
        [T] * B,
        settings,
    )
    assert result.step == 1 and result.after < result.before

    # the same in float64, element by element; the sequence in the middle is the one held out
    G = qparams.scale.shape[1]
    x = torch.cat([inputs[p] for p in range(B) if p != B // 2]).double().reshape(-1, C)
    scale, z = qparams.scale.double(), qparams.zero_point
    zero = torch.zeros(R, G, dtype=torch.float64) if z is None else z.double()
    W, old = weight.double(), codes.double()
    wrong = x @ (start.dense().double() - exact.dense().double()).T
    y = x @ exact.dense().double().T
    energy = y.square().sum(1)
    wrong *= torch.minimum(torch.ones_like(energy), 4 * energy.median() / energy)[:, None]
    slope = wrong.T @ x
    dW = start.dense().double() - W
    new, pull = torch.empty(R, C, dtype=torch.int8), torch.zeros(R, G, dtype=torch.float64)
    for r in range(R):
        for c in range(C):
            g = c * G // C
            best = float(start.dense()[r, c]) - float(dW[r] @ gram[:, c].double()) / float(gram[c, c])
            position = best / float(scale[r, g]) + float(zero[r, g])
            position = min(max(position, float(old[r, c]) - 0.49), float(old[r, c]) + 0.49)
            position -= 0.1 * float(torch.sign(slope[r, c] * scale[r, g]))
            new[r, c] = min(max(round(position), grid.qmin), grid.qmax)
            pull[r, g] += slope[r, c] * (old[r, c] - zero[r, g]) * scale[r, g]
    if strategy == "tensor":
        pull = pull.sum().expand(R, G)
    assert torch.equal(result.solved["w"].codes, new)
    assert int((new != codes).sum()) >= 3
    expected = (scale * (1 - 1e-3 * pull.sign())).float()
    torch.testing.assert_close(result.solved["w"].qparams.scale, expected)


@pytest.mark.parametrize("name", GRIDS)
def test_the_block_comes_nearer_on_every_grid(name):
    block, grid = Block(), GRIDS[name]
    starts = block.starts(grid)
    before = {n: s.solved.codes.clone().float() for n, s in starts.items()}
    result = tune(starts, block.output, block.target, block.lengths, FAST)
    assert result.step > 0 and result.after < 0.99 * result.before
    assert block.error(result.solved) < block.error({n: s.solved for n, s in starts.items()})
    for n, z in result.solved.items():
        codes, qparams = z.quantized
        assert codes.dtype == grid.code_dtype and qparams.scale.dtype == grid.scale_dtype
        assert torch.equal(starts[n].solved.codes.float(), before[n]), "the start is not changed"
        if grid.values == "int":
            assert grid.qmin <= int(codes.min()) and int(codes.max()) <= grid.qmax
        else:
            values = values_of(codes)
            assert torch.equal(grid.nearest_(values.clone()), values)
        assert torch.equal(grid.repeated(grid.once(qparams.scale), len(codes)), qparams.scale), (
            "what is shared stays so"
        )
        old = starts[n].solved.qparams
        assert grid.scales == "free" or torch.equal(qparams.scale, old.scale)
        assert qparams.zero_point is old.zero_point and qparams.global_scale is old.global_scale


def test_never_worse_on_what_is_held_out():
    block = Block()
    starts = block.starts(GRIDS["group"])
    wild = dataclasses.replace(FAST, lr=5.0, scale_lr=0.5)
    result = tune(starts, block.output, block.target, block.lengths, wild)
    assert result.step == 0 and result.after == result.before
    assert all(result.solved[n] is s.solved for n, s in starts.items())


def test_what_is_kept_is_what_is_best_on_them():
    """The loss that is told is that of what is returned, and on sequences that gave no gradients."""
    block = Block(sequences=8)
    seen = []

    def output(weights, picked):
        if any(w.requires_grad for w in weights.values()):
            seen.extend(picked)
        return block.output(weights, picked)

    settings = dataclasses.replace(FAST, holdout=0.25, iters=12)
    result = tune(block.starts(GRIDS["group"]), output, block.target, block.lengths, settings)
    held = sorted(set(range(8)) - set(seen))
    assert len(held) == 2 and len(seen) == 12 * 4 - 2 * 6  # six are left, in batches of 4 and 2
    dense = {n: z.dense() for n, z in result.solved.items()}
    wanted = block.target(held)
    w = token_weights(wanted)
    lost = ((block.output(dense, held) - wanted).square() * w).sum() / (wanted.square() * w).sum()
    assert abs(float(lost) / result.after - 1) < 1e-5


def test_the_same_every_time_and_by_the_seed():
    block = Block()
    starts = block.starts(GRIDS["group asym bf16"])
    runs = [tune(starts, block.output, block.target, block.lengths, s) for s in (FAST, FAST)]
    other = tune(starts, block.output, block.target, block.lengths, dataclasses.replace(FAST, seed=6))
    for n in starts:
        assert torch.equal(runs[0].solved[n].codes, runs[1].solved[n].codes)
        assert torch.equal(runs[0].solved[n].qparams.scale, runs[1].solved[n].qparams.scale)
    assert any(not torch.equal(runs[0].solved[n].codes, other.solved[n].codes) for n in starts)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_pruned_codes_stay_pruned(symmetric):
    block = Block()
    masks = {n: keep_best(w.abs(), 0.5, Structure(2, 4)) for n, w in block.weights.items()}
    starts = block.starts(Grid(4, symmetric, 8, False, F32), masks)
    result = tune(starts, block.output, block.target, block.lengths, dataclasses.replace(FAST, lr=0.02))
    assert result.step > 0
    for n, z in result.solved.items():
        assert not z.dense()[~masks[n]].any() and holds(z.dense(), Structure(2, 4))
        assert not torch.equal(z.codes, starts[n].solved.codes)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_weights_that_are_only_pruned(dtype):
    block = Block()
    masks = {n: keep_best(w.abs(), 0.5, None) for n, w in block.weights.items()}
    zero = torch.zeros(())
    starts = {
        n: Start(Solved(None, None, zero, (w * masks[n]).to(dtype)), None, None, masks[n])
        for n, w in block.weights.items()
    }
    settings = dataclasses.replace(FAST, weight_lr=0.01)
    result = tune(starts, block.output, block.target, block.lengths, settings)
    assert result.after < 0.9 * result.before
    for n, z in result.solved.items():
        assert z.weight.dtype == dtype and not z.weight[~masks[n]].any()


def test_predictions_as_the_objective(monkeypatch):
    """Slopes are those of autograd at the places that are looked at, and the predictions come nearer by tuning."""
    monkeypatch.setattr("bitpress.math.objective.POSITIONS", 40)
    monkeypatch.setattr("bitpress.math.objective.AT_ONCE", 16)
    head = normal(50, 32, seed=9) * 0.2
    objective = Divergence(lambda hidden: hidden @ head.T)
    got, wanted = normal(3, 25, 32, seed=7), normal(3, 25, 32, seed=8)
    for turn in range(3):  # 75 places, every second
        slope = objective.slope(got, wanted).flatten(0, 1)
        hidden = got.flatten(0, 1).clone().requires_grad_()
        p, q = ((x @ head.T).log_softmax(-1) for x in (wanted.flatten(0, 1), hidden))
        (p.exp() * (p - q)).sum(-1)[turn % 2 :: 2].sum().backward()
        assert torch.nn.functional.cosine_similarity(slope.flatten(), hidden.grad.flatten(), 0) > 1 - 1e-5
        assert abs(float(slope.square().mean()) - 1) < 1e-4 and not slope[1 - turn % 2 :: 2].any()
    lost, count = objective.lost(got, wanted)
    assert float(count) == 38
    assert abs(float(lost) - float((p.exp() * (p - q)).sum(-1)[::2].sum().detach())) < 1e-3

    block = Block()
    result = tune(
        block.starts(GRIDS["group asym bf16"]), block.output, block.target, block.lengths, FAST,
        objective=Divergence(lambda hidden: hidden @ head.T),
    )  # fmt: skip
    assert result.step > 0 and result.after < 0.95 * result.before

    def divergence(weights):
        everything = list(range(len(block.inputs)))
        p, q = ((x @ head.T).log_softmax(-1) for x in (block.target(everything), block.output(weights, everything)))
        return float((p.exp() * (p - q)).sum())

    starts = {n: s.solved.dense() for n, s in block.starts(GRIDS["group asym bf16"]).items()}
    assert divergence({n: z.dense() for n, z in result.solved.items()}) < 0.95 * divergence(starts)


def test_scales_can_be_left_alone():
    block = Block()
    starts = block.starts(GRIDS["group"])
    result = tune(starts, block.output, block.target, block.lengths, dataclasses.replace(FAST, scale_lr=0.0))
    assert result.step > 0
    for n, z in result.solved.items():
        assert torch.equal(z.qparams.scale, starts[n].solved.qparams.scale)
    only = tune(starts, block.output, block.target, block.lengths, dataclasses.replace(FAST, lr=0.0))
    assert all(torch.equal(z.codes, starts[n].solved.codes) for n, z in only.solved.items())


def test_the_usual_learning_rate_is_the_same_part_of_the_range():
    rates = {bits: usual_lr(Grid(bits, True, None, False, F32)) for bits in (2, 3, 4, 8)}
    assert rates == {2: 0.012, 3: 0.006, 4: 0.003, 8: 0.003 / 16}
    assert usual_lr(GRIDS["fp8 block"]) == usual_lr(GRIDS["nvfp4"]) == 0.003
    block, grid = Block(), Grid(3, True, 8, False, F32)
    runs = [
        tune(block.starts(grid), block.output, block.target, block.lengths, dataclasses.replace(FAST, lr=lr))
        for lr in (None, 0.006)
    ]
    assert runs[0].step > 0 and all(
        torch.equal(runs[0].solved[n].codes, runs[1].solved[n].codes) for n in block.weights
    )


def test_sequences_of_one_step_have_one_length():
    block = Block(sequences=12)
    starts = block.starts(GRIDS["group"])
    for i in (1, 4, 5, 8, 9):
        block.inputs[i], block.clean[i] = block.inputs[i][:, :20], block.clean[i][:, :20]
        block.lengths[i] = 20

    def output(weights, picked):
        assert len({block.lengths[p] for p in picked}) == 1 and len(picked) <= 4
        return block.output(weights, picked)

    assert tune(starts, output, block.target, block.lengths, FAST).step > 0


def test_a_linear_that_no_token_reaches():
    block = Block()
    starts = block.starts(GRIDS["group"])
    starts["idle"] = Start(starts["up"].solved, GRIDS["group"])
    result = tune(starts, block.output, block.target, block.lengths, FAST)
    assert result.step > 0 and torch.equal(result.solved["idle"].codes, starts["idle"].solved.codes)


def test_what_a_column_would_like_to_be():
    weight, x, grid = normal(5, 12), normal(40, 12, seed=1), GRIDS["channel"]
    x[:, 3] = 0
    gram = x.T @ x
    z = solved(weight, quantize(weight, find_qparams(weight, grid), grid), find_qparams(weight, grid), gram)
    ideal = ideal_weight(weight, z, gram)

    def loss(row, column, value):
        dense = z.dense().double()
        dense[row, column] = value
        return float(((dense - weight) @ x.double().T)[row].square().sum())

    weight, x = weight.double(), x.double()
    for row, column in ((0, 0), (2, 7), (4, 11)):
        best = float(ideal[row, column])
        assert loss(row, column, best) <= min(loss(row, column, best + d) for d in (-0.01, 0.01))
    assert torch.equal(ideal[:, 3], weight[:, 3].float())
    assert torch.equal(ideal_weight(weight.float(), z, None), weight.float())


def test_massive_tokens_count_as_much_as_others():
    y = normal(2, 16, 8)
    y[0, 0] *= 1000
    w = token_weights(y)
    counted = (y.square().sum(-1, keepdim=True) * w).reshape(-1)
    assert w.shape == (2, 16, 1) and float(w.max()) == 1
    assert float(counted[0]) <= 4.01 * float(y.square().sum(-1).median())
    assert torch.equal(token_weights(y * 1e-30).isfinite(), torch.ones_like(w).bool())


# the modifier


BAD = {
    "iters": (0, "must be at least 1, got 0"),
    "batch_size": (-1, "must be at least 1, got -1"),
    "lr": (-0.1, "must be 0 or a positive number, got -0.1"),
    "scale_lr": (float("inf"), "must be 0 or a positive number, got inf"),
    "weight_lr": (float("nan"), "must be 0 or a positive number, got nan"),
    "holdout": (0.0, "must be a share above 0, at most 0.5, got 0.0"),
    "targets": ([], "empty, so nothing would be tuned"),
    "ignore": ("re:(", "'re:(' is not a regular expression"),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_values(key):
    value, message = BAD[key]
    with pytest.raises(RecipeError, match=rf"TuneModifier\.{key}: ") as refused:
        TuneModifier(**{key: value})
    assert message in str(refused.value)


def test_all_faults_together_and_unknown_keys():
    with pytest.raises(RecipeError) as refused:
        Recipe.load("TuneModifier: {iters: many, holdout: 0.9, learning_rate: 1}")
    text = str(refused.value)
    assert "TuneModifier.iters: expected a whole number, got 'many'" in text
    assert "TuneModifier.holdout: must be a share" in text and "TuneModifier.learning_rate: unknown key" in text


def test_a_recipe_that_reloads():
    recipe = Recipe.load({"modifiers": [{"GPTQModifier": {"scheme": "W4A16"}}, {"TuneModifier": {"lr": "5e-3"}}]})
    assert recipe.stages[0].modifiers[1] == TuneModifier(lr=0.005)
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert TuneModifier().settings(3) == Settings(seed=3)
