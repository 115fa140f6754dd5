"""Memory from shapes: what is planned holds, counts nothing twice, and forgets nothing."""

import pytest
import torch

from bitpress import budget as budgets
from bitpress import plan
from bitpress.errors import PlanError
from bitpress.math.stats import StatsAccumulator
from bitpress.recipe import Recipe
from bitpress.subject import ModuleSubject
from conftest import build

CUDA = torch.device("cuda")
GPTQ = {"GPTQModifier": {"scheme": "W4A16", "group_size": 16, "ignore": ["lm_head"]}}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(budgets, "available", lambda device: 8 << 30)
    monkeypatch.setattr(budgets, "DEVICE_BYTES", 0)  # a thousand times what these models take


@pytest.fixture
def model():
    return build("llama", num_hidden_layers=2)


def planned(model, limit=None, recipe=GPTQ, samples=64, length=256, **more):
    (stage,) = Recipe.load(recipe).stages
    subject = ModuleSubject(model)
    try:
        return plan.make(
            stage.modifiers, subject, samples=samples, length=length, device=CUDA, max_memory=limit, **more
        )
    finally:
        subject.close()


def least(model, **more):
    """The smallest limit that is accepted, by bisection."""
    low, high = 1, 1 << 30
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            planned(model, middle, **more)
            high = middle
        except PlanError:
            low = middle
    return high


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("recipe", [GPTQ, {"SparseGPTModifier": {"sparsity": 0.5}}], ids=["gptq", "sparsegpt"])
def test_what_is_planned_is_within_every_limit_that_is_accepted(model, recipe, propagate):
    start = least(model, recipe=recipe)
    for limit in (start, start + 1000, int(1.1 * start), int(1.5 * start), 3 * start, 10 * start):
        made = planned(model, limit, recipe=recipe, propagate=propagate)
        assert 0 < made.device_bytes <= limit
    with pytest.raises(PlanError, match="raise --max-memory"):
        planned(model, start - 1, recipe=recipe)


def test_more_memory_is_used_for_all_gram_matrices_then_for_hidden_states(model):
    start = least(model)
    tight, roomy = planned(model, start), planned(model, 20 * start)
    widest = max(s.columns for s in tight.sites)
    assert tight.gram_bytes == 4 * widest**2 and tight.hidden_on == "host"
    assert roomy.gram_bytes == sum(4 * s.columns**2 for s in roomy.sites if s.block == 0)
    assert roomy.hidden_on == "device" and roomy.batch_size > tight.batch_size


def test_inputs_of_a_block_count_with_what_any_of_its_linears_needs(model):
    """One pass gathers it all, so that is what has to fit."""
    static = {"FP8": ["re:.*(q|k|v|gate|up)_proj"]}
    int4 = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}}
    groups = {**static, "int4": {**int4, "targets": ["re:.*(o|down)_proj"]}}
    made = planned(model, recipe={"GPTQModifier": {"config_groups": groups, "ignore": ["lm_head"]}})
    sites = [s for s in made.sites if s.block == 0]
    needs = frozenset().union(*(s.needs for s in sites))
    assert any(s.needs != needs for s in sites)
    assert made.gram_bytes >= sum(StatsAccumulator.nbytes(s.columns, needs) for s in sites)


def test_pinned_hidden_states_count_as_they_are_had(model):
    exact = 64 * 256 * model.config.hidden_size * 4
    by_batch = {}
    for batch in (4, 5, 8):
        made = planned(model, least(model), batch_size=batch, samples=64)
        assert made.hidden_on == "host"
        by_batch[batch] = made.host_bytes
    assert by_batch[4] == by_batch[8]
    assert by_batch[5] - by_batch[4] == 13 * 8 * (exact // 64) - exact  # 13 batches, each rounded up to 8 sequences
    second = {"GPTQModifier": {**GPTQ["GPTQModifier"], "correct": 0.4}}  # a quarter of the batches in two more streams
    limit = least(model, recipe=second)
    made = planned(model, limit, recipe=second, batch_size=5)
    plain = planned(model, limit, recipe=GPTQ, batch_size=5)
    assert made.hidden_on == plain.hidden_on == "host"
    assert made.host_bytes - plain.host_bytes == 2 * 4 * 8 * (exact // 64)
    sizes = set()
    start = least(model)
    for times in range(4, 40, 3):
        chosen = planned(model, times * start, samples=4096)
        assert chosen.hidden_on == "host"
        sizes.add(chosen.batch_size)
    assert len(sizes) > 1 and all(size & (size - 1) == 0 for size in sizes)


def test_experts_take_one_forward_where_their_outputs_have_room():
    experts = build("qwen3_moe", num_hidden_layers=2)
    roomy = planned(experts, propagate=False)
    assert roomy.spare_hidden and roomy.hidden_on == "device" and not planned(experts).spare_hidden
    start = least(experts)
    for limit in (start, int(1.5 * start), 2 * start, 4 * start):
        made = planned(experts, limit, propagate=False)
        assert made.device_bytes <= limit and not (made.spare_hidden and made.hidden_on != "device")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [(GPTQ, True), ({"SparseGPTModifier": {"sparsity": 0.5}}, False),
     ({"SparseGPTModifier": {"sparsity": 0.5}, "QuantizationModifier": {"scheme": "W4A16", "group_size": 16}}, False),
     ({"WandaPruningModifier": {"sparsity": 0.5}}, True)],
    ids=["gptq", "sparsegpt", "joint", "wanda"],
)  # fmt: skip
def test_no_forward_runs_beside_a_solver_that_moves_switches_of_the_process(model, recipe, expected):
    assert planned(model, recipe=recipe, propagate=False).solves_beside is expected
    assert not planned(model, recipe=recipe).solves_beside
