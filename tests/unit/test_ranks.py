"""How work is divided among processes, and what one process does alone."""

from __future__ import annotations

import pytest
import torch

from bitpress import ConfigError, ranks
from bitpress.math.stats import InputStats


def parts(monkeypatch, weights, world):
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    found = []
    for number in range(world):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        found.append(ranks.portion(weights))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("weights", [[1] * 8, [100, *[1] * 9], [*[1] * 9, 100], [5, 4, 3, 2, 1, 1, 1, 1], [7] * 37])
def test_parts_cover_everything_once_and_none_is_empty(monkeypatch, weights, world):
    found = parts(monkeypatch, weights, world)
    assert [i for part in found for i in part] == list(range(len(weights)))
    assert all(len(part) for part in found)
    sums = [sum(weights[i] for i in part) for part in found]
    assert max(sums) <= sum(weights) / world + max(weights)
    assert [ranks.holder(found, i) for i in (0, len(weights) - 1)] == [0, world - 1]


def test_equal_things_are_divided_equally(monkeypatch):
    assert [len(p) for p in parts(monkeypatch, [3] * 32, 2)] == [16, 16]
    assert [len(p) for p in parts(monkeypatch, [3] * 32, 8)] == [4] * 8


def test_jobs_go_to_those_who_are_free(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert ranks.owners([1.0, 9.0, 3.0, 4.0, 2.0]) == [0, 0, 1, 1, 1]
    assert ranks.owners([]) == []
    assert ranks.owners([2.0, 2.0, 2.0, 2.0]) == [0, 1, 0, 1]


def test_one_process_is_alone():
    stats = [(InputStats(torch.eye(2), 5), ("a",))]
    assert ranks.reduce(stats, torch.device("cpu")) is stats and ranks.first() and ranks.rank() == 0
    value = {"a": torch.ones(2)}
    assert ranks.share(value) is value and ranks.gathered(3) == [3] and ranks.least(1, 2) == [1, 2]
    assert ranks.from_first(lambda: 7) == 7 and ranks.local(torch.device("cpu")) == 1
    ranks.join("auto")
    assert ranks.world_size() == 1


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes or more on this machine, but 2 GPUs"):
        ranks.gpu()
