"""Tasks at the same time: their order, their settings, and that the process is as it was afterwards."""

import threading

import pytest
import torch

from bitpress.threads import MOST, Beside, together, workers


@pytest.fixture(params=[1, 2, 2 * MOST + 1])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_results_are_in_order(threads, count):
    assert together([lambda i=i: i * i for i in range(count)]) == [i * i for i in range(count)]


def test_at_the_same_time_with_a_share_of_the_threads(threads):
    assert workers() == min(threads, MOST)
    here = threading.Barrier(workers(), timeout=30)  # breaks if one waits for another to end

    def task():
        here.wait()
        return torch.get_num_threads(), torch.is_grad_enabled()

    share = threads if workers() == 1 else threads // workers()
    assert together([task] * workers()) == [(share, False)] * workers()


def test_an_error_comes_out(threads):
    def fail():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        together([lambda: 1, fail, lambda: 2])


def test_later_threads_start_with_all(threads):
    together([lambda: None] * 4)
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [threads]
    assert torch.is_grad_enabled()


def test_one_task_beside_and_the_next_one_after_it():
    beside, cpu, order = Beside("test"), torch.device("cpu"), []
    may_end = threading.Event()

    def first():
        assert may_end.wait(30) and not torch.is_grad_enabled()
        order.append("first")

    beside.start(cpu, first)
    order.append("here")
    may_end.set()
    beside.start(cpu, lambda: order.append("second"))
    beside.settle()
    assert order == ["here", "first", "second"]
    beside.settle()  # nothing is left to wait for
    beside.close()


def test_an_error_beside_comes_out_where_it_is_waited_for():
    beside, cpu = Beside("test"), torch.device("cpu")

    def fail():
        raise KeyError("broken")

    beside.start(cpu, fail)
    with pytest.raises(KeyError, match="broken"):
        beside.start(cpu, lambda: None)
    beside.start(cpu, fail)
    beside.close()  # an error that led here is not hidden by another
