"""Model folders: sizes known before writing, whole files, and one clear error for bad ones."""

import json
import os
import random
import stat
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitpress.checkpoint import (
    DTYPES,
    INDEX,
    Source,
    copy_companions,
    file_size,
    read_header,
    read_tensors,
    weight_files,
    write_index,
    write_json,
    write_shard,
)
from bitpress.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)})
    return path


def random_spec(seed):
    draw = random.Random(seed)
    names = {"".join(draw.choices('abcxyz.019_é"\\', k=draw.randint(1, 12))) for _ in range(draw.randint(0, 14))}
    sizes = (0, 1, 2, 3, 17, 40)
    return {
        name: (draw.choice(list(DTYPES.values())), tuple(draw.choices(sizes, k=draw.randint(0, 3))))
        for name in sorted(names, key=lambda n: draw.random())
    }


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_size_is_known_before_writing(first, tmp_path):
    for seed in range(first, first + 50):
        spec, path, theirs = random_spec(seed), tmp_path / f"{seed}.safetensors", tmp_path / "theirs.safetensors"
        tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in spec.items()}
        write_shard(path, tensors)
        assert path.stat().st_size == file_size(spec), spec
        save_file(tensors, theirs, metadata={"format": "pt"})
        assert path.read_bytes() == theirs.read_bytes(), spec
        _, header = read_header(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert {n: (DTYPES[e["dtype"]], tuple(e["shape"])) for n, e in header.items()} == spec


def test_shards_are_read_by_others(tmp_path):
    whole = torch.randn(6, 4)
    tensors = {"half": whole[:3], "other": whole[3:], "turned": whole.T, "scalar": torch.tensor(3.5)}
    tensors["needs_grad"] = torch.nn.Parameter(torch.ones(2))
    tensors |= {
        "one number": whole[:1, :4:2][:, :1],
        "strided": whole[::2, 1:3],
        "none": whole[:0],
        "turned none": whole[:0].T,
    }
    write_shard(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_the_users(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_shard(tmp_path / "x.safetensors", {"a": torch.ones(1)})
        write_json(tmp_path / "x.json", {})
        assert os.umask(mask) == mask, "the mask of the process is left as it was"
    finally:
        os.umask(before)
    for name in ("x.safetensors", "x.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_a_shard_is_there_whole_or_not_at_all(file, monkeypatch):
    before = file.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitpress.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(file, {"c": torch.ones(100)})
    with pytest.raises(KeyboardInterrupt):
        write_json(file.with_name("x.json"), {"a": 1})
    assert file.read_bytes() == before
    assert weight_files(file.parent) == [file]
    assert not file.with_name("x.json").exists()


def test_json_keeps_its_order(tmp_path):
    write_json(tmp_path / "x.json", {"b": "é", "a": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'


def test_a_header(file):
    raw, header = read_header(file)
    assert json.loads(raw) == header
    assert header["a.weight"] == {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


def test_a_file_cut_short_anywhere(file):
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for end in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length - 1, 8 + length, 8 + length + 1, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (not a safetensors file|\d+ bytes, but its)"):
            read_header(file)
        with pytest.raises(CheckpointError):
            Source(file.parent)
    file.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=f"{len(whole) + 1} bytes, but its header asks for {len(whole)}"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [b"[1]", b'"x"', b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"{", b"\xff\xfe", b'{"a": {"data_offsets": 3}}'],
)
def test_what_is_no_header(header, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut short"):
        read_header(file)


def test_a_dtype_that_is_not_supported(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a has dtype F4"):
        Source(tmp_path)


def test_a_source(file):
    source = Source(file.parent)
    assert source.spec("a.weight") == (torch.float32, (3, 4))
    assert source.spec("b") == (torch.bfloat16, (5,))
    found = source.read(["b", "a.weight"])
    assert torch.equal(found["a.weight"], torch.arange(12.0).view(3, 4))
    found["a.weight"].zero_()
    assert torch.equal(read_tensors([("a.weight", file)])["a.weight"], torch.arange(12.0).view(3, 4))


def test_a_fingerprint_changes_with_the_folder(file):
    (file.parent / "config.json").write_text("{}")
    prints = [Source(file.parent).fingerprint()]
    assert Source(file.parent).fingerprint() == prints[0]
    os.utime(file, ns=(0, 1))
    prints.append(Source(file.parent).fingerprint())
    (file.parent / "config.json").write_text('{"a": 1}')
    prints.append(Source(file.parent).fingerprint())
    write_shard(file, {"a.weight": torch.zeros(4, 3), "b": torch.ones(5, dtype=torch.bfloat16)})
    os.utime(file, ns=(0, 1))
    prints.append(Source(file.parent).fingerprint())
    assert len({p["sha256"] for p in prints}) == 4


def test_an_index_names_the_files(file):
    folder = file.parent
    write_shard(folder / "part.safetensors", {"c": torch.ones(2)})
    write_shard(folder / "stray.safetensors", {"d": torch.ones(2)})
    assert weight_files(folder) == [file]  # what transformers reads where there is no index
    write_index(folder, {"part.safetensors": {"c": 8}, "model.safetensors": {"b": 10, "a.weight": 48}})
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": 66}
    assert list(index["weight_map"]) == ["a.weight", "b", "c"]
    assert weight_files(folder) == [file, folder / "part.safetensors"]
    assert set(Source(folder).tensors) == {"a.weight", "b", "c"}
    file.unlink()
    with pytest.raises(CheckpointError, match=r"the index names files that are not there: model\.safetensors$"):
        weight_files(folder)
    (folder / INDEX).write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="not a weight index"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "holds GGUF"),
        ("pytorch_model.bin", "holds pickle weights"),
        ("model.pth", "holds pickle weights"),
        ("readme.md", "no safetensors files in it"),
    ],
)
def test_folders_without_safetensors(name, message, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such model folder"):
        weight_files(tmp_path / name)


def test_companions(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    target.mkdir()
    (source / "folder.json").mkdir(parents=True)
    kept = ["tokenizer.json", "chat_template.jinja", "merges.txt", "modeling_x.py", "LICENSE", "generation_config.json"]
    left = ["config.json", INDEX, "report.json", "training_args.bin", "x.safetensors"]
    for name in kept + left:
        (source / name).write_text(name)
    save_file({"a": torch.ones(1)}, source / "x.safetensors")
    copy_companions(source, target)
    assert sorted(os.listdir(target)) == sorted(kept)
    assert (target / "LICENSE").read_text() == "LICENSE"
