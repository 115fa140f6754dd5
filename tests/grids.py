"""Weights and grids to round them on, and the same arithmetic by hand in float64."""

import torch

from bitpress.math.grid import Grid

R, C, SIZE = 6, 48, 16
STRATEGIES = ["tensor", "channel", "group"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid(bits=4, symmetric=True, strategy="group", dtype=torch.float32):
    return Grid(bits, symmetric, SIZE if strategy == "group" else None, strategy == "tensor", dtype)


def random(*shape, seed=0):
    """Heavy-tailed numbers, so that clipping pays."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * x.abs()


def spread(x, g):
    """Scales or zero points (R, G), one for each weight (R, C) in float64."""
    return x.double().repeat_interleave(C // g.groups(C), 1)


def by_hand(weight, scale, zero, g):
    """Weights after rounding on a grid, in float64."""
    zero = 0 if zero is None else spread(zero, g)
    codes = (weight.double() / spread(scale, g) + zero).round().clamp(g.qmin, g.qmax)
    return (codes - zero) * spread(scale, g)


# floats: every value by hand from exponent and mantissa bits (sign aside), the last two of e4m3 being NaN and none
def magnitudes(exponent_bits, mantissa_bits, bias, count):
    out = []
    for code in range(count):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        lead, power = (1, exponent - bias) if exponent else (0, 1 - bias)
        out.append((lead + mantissa / (1 << mantissa_bits)) * 2.0**power)
    return torch.tensor(out, dtype=torch.float64)


KINDS = {
    "e2m1": magnitudes(2, 1, 1, 8),
    "e2m3": magnitudes(2, 3, 1, 32),
    "e4m3": magnitudes(4, 3, 7, 127),
}
BITS = {"e2m1": 4, "e2m3": 6, "e4m3": 8}
LARGEST = {"e2m1": 6.0, "e2m3": 7.5, "e4m3": 448.0}


def float_grid(values, scales="free", strategy="group", dtype=torch.float32, size=SIZE, block_rows=1):
    per_tensor = strategy == "tensor"
    group = size if strategy == "group" else None
    return Grid(BITS[values], True, group, per_tensor, dtype, values, scales, block_rows)
