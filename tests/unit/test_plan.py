"""The small figures of a plan: sizes for people, group sizes to suggest, bits per weight."""

from dataclasses import replace

import pytest
import torch

from bitpress.budget import gib, parse_bytes
from bitpress.errors import ConfigError, sized
from bitpress.modifiers.quantization import SchemeGroup
from bitpress.schemes import QuantArgs, Scheme, preset
from bitpress.sites import Site, Step, bits_per_weight, near_divisors


def site(scheme, rows=256, columns=512):
    group = SchemeGroup("group_0", ("Linear",), scheme, None, "minmax")
    return Site("x", "x", 0, rows, columns, (Step(None, group),), None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        (12345, 12345),
        ("12345", 12345),
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("8 GiB ", 8 << 30),
        ("8Gi", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("500m", 500_000_000),
        ("64KiB", 64 << 10),
        ("3k", 3000),
        ("2TiB", 2 << 40),
        ("1t", 10**12),
        ("2e9", 2 * 10**9),
        ("1.5e3k", 1_500_000),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "GiB", "8 X", "8XB", "-8GiB", "0", "0GiB", "1.5.2GiB", ".", "1e999", "8iB", "eight", 0, -1]
)
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"max_memory: .* is not a size; write for example 8GiB, 500MB"):
        parse_bytes(text)


def test_bytes_for_people():
    assert gib(1 << 30) == "1.00 GiB"
    assert gib(5 << 28) == "1.25 GiB"
    assert gib((1 << 30) - (1 << 20)) == "1023.0 MiB"
    assert gib(93.4 * (1 << 20)) == "93.4 MiB"
    assert gib(0) == "0.0 MiB" and gib(1500) == "1.5 KiB"
    assert [sized(n) for n in (0, 940, 93_400, 999_999)] == ["0.0 MB", "0.9 kB", "93.4 kB", "1.0 MB"]


@pytest.mark.parametrize(
    ("columns", "size", "tries"),
    [
        (11008, 96, [64, 86, 128]),
        (4096, 100, [32, 64, 128]),
        (768, 100, [64, 96, 128]),
        (960, 128, [32, 64, 120]),
        (49, 32, [49]),
        (7, 32, [7]),
        (1031, 128, [1031]),
    ],
)
def test_group_sizes_that_divide(columns, size, tries):
    assert near_divisors(columns, size) == tries


@pytest.mark.parametrize("columns", [*range(1, 200), 4864, 5120, 13824])
def test_suggestions_always_divide(columns):
    found = near_divisors(columns, 128)
    assert 1 <= len(found) <= 3
    assert found == sorted(set(found))
    assert all(columns % n == 0 for n in found)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (preset("W4A16"), 4 + 16 / 128),
        (preset("W4A16_ASYM"), 4 + 16 / 128 + 4 / 128),
        (preset("W3A16", 64), 3 + 16 / 64),
        (preset("W8A8"), 8 + 16 / 512),
        (preset("W4A16", -1), 4 + 16 / 512),
        (Scheme(name=None, weights=QuantArgs(num_bits=8, strategy="tensor")), 8 + 16 / (256 * 512)),
    ],
)
def test_bits_per_weight(scheme, expected):
    assert bits_per_weight(site(scheme)) == pytest.approx(expected, abs=1e-12)


def test_bits_per_weight_of_another_dtype_and_of_words_partly_used():
    assert bits_per_weight(replace(site(preset("W4A16")), dtype=torch.float32)) == 4 + 32 / 128
    # 45 codes of 4 bits take 6 words
    assert bits_per_weight(site(preset("W4A16", -1), 3, 45)) == pytest.approx((6 * 32 + 16) / 45)
