"""Weights that are read while others are at work; the copies to a GPU are in tests/gpu."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.ahead import Ahead
from bitpress.subject import FolderSubject
from conftest import build, save

CPU = torch.device("cpu")


@pytest.fixture
def unpinned(monkeypatch):
    """Page-locked memory needs a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def test_a_block_is_read_once_and_taken_once(unpinned):
    read = []
    ahead = Ahead(lambda prefix: read.append(prefix) or {prefix + "w": torch.ones(2)})
    assert ahead.take("a.", CPU) is None and ahead.take(None, CPU) is None
    ahead.start("a.", None)
    ahead.start("a.", None)
    assert ahead.take("a.", CPU).keys() == {"a.w"} and ahead.take("a.", CPU) is None
    assert read == ["a."]


def test_what_fails_to_be_read_is_raised_where_it_is_taken(unpinned):
    def fail(prefix):
        raise OSError(prefix)

    ahead = Ahead(fail)
    ahead.start("a.", None)
    with pytest.raises(OSError, match=r"a\."):
        ahead.take("a.", CPU)


def test_what_was_begun_is_given_up(unpinned):
    begun, go = threading.Event(), threading.Event()

    def read(prefix):
        begun.set()
        go.wait()
        return {}

    ahead = Ahead(read)
    ahead.start("a.", None)
    begun.wait()
    go.set()
    ahead.close()
    assert ahead.take("a.", CPU) is None


def test_weights_come_in_the_dtype_of_the_model(tmp_path, unpinned):
    """The plan counts them in it, whatever the file holds."""
    base = save(build("llama", torch.bfloat16), tmp_path / "base")
    file = base / "model.safetensors"
    save_file({n: t.float() for n, t in load_file(file).items()}, file, {"format": "pt"})
    subject = FolderSubject(base)
    prefix = subject.blocks.prefix(0)
    subject.fetch(prefix, None)
    taken = subject._ahead.take(prefix, CPU)
    assert {t.dtype for t in taken.values()} == {torch.bfloat16}
    subject.load(prefix, CPU)
    assert all(torch.equal(taken[k], subject.model.state_dict()[k]) for k in taken)
