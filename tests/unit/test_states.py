"""Hidden states on the device, in host memory and on disk."""

import pytest
import torch

from bitpress.states import HiddenStates

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_what_goes_in_comes_out(where, dtype, tmp_path):
    states = HiddenStates(where, CPU, tmp_path / "work")
    batches = [torch.randn(b, 5, 8).to(dtype) for b in (4, 4, 1)]
    assert states[0] is None
    for i, batch in enumerate(batches):
        states[i] = batch
    assert states[3] is None
    for i, batch in enumerate(batches):
        found = states[i]
        assert torch.equal(found, batch) and found.dtype == dtype and found.device == CPU
    states[1] = batches[0] + 1  # the next block's
    assert torch.equal(states[1], batches[0] + 1)
    assert torch.equal(states[2], batches[2])
    states.close()
    assert not any(tmp_path.rglob("*.pt"))


def test_disk_files_are_deleted(tmp_path):
    states = HiddenStates("disk", CPU, tmp_path / "work")
    states[0] = torch.ones(2, 3, 4)
    (folder,) = (tmp_path / "work").iterdir()
    assert [f.name for f in folder.iterdir()] == ["0.pt"]
    assert (folder / "0.pt").stat().st_size < 4096
    states.close()
    assert list((tmp_path / "work").iterdir()) == []
    states.close()


def test_disk_without_a_folder():
    states = HiddenStates("disk", CPU)
    states[0] = torch.ones(1, 2, 3)
    folder = states._folder
    assert torch.equal(states[0], torch.ones(1, 2, 3)) and folder.is_dir()
    states.close()
    assert not folder.exists()


@pytest.mark.parametrize("where", ["device", "host"])
def test_memory_needs_no_folder(where, tmp_path):
    states = HiddenStates(where, CPU, tmp_path / "work")
    states[0] = torch.ones(1)
    assert not (tmp_path / "work").exists()
    states.close()
    assert states[0] is None
