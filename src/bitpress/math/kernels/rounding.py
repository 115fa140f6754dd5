"""Rounding to a grid within a kernel: `Grid.nearest_`, number for number."""

from __future__ import annotations

import triton
import triton.language as tl

from bitpress.math.grid import FLOATS, Grid

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to even


@triton.jit  # type: ignore[untyped-decorator]
def nearest(x, low, high, least, fraction, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest value of a code; the numbers are those of `numbers_of`."""
    if FLOAT:
        binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.maximum(binade, least) * fraction
        x = tl.minimum(tl.maximum((tl.div_rn(x, unit) + ROUND - ROUND) * unit, low), high)
    else:
        x = tl.minimum(tl.maximum(x, low - 1.0), high + 1.0)
        x = tl.minimum(tl.maximum(x + ROUND - ROUND, low), high)
    return x


def numbers_of(grid: Grid) -> tuple[float, float, float, float]:
    """Least and greatest value, and for floats the smallest binade and the step within one."""
    if grid.values == "int":
        return float(grid.qmin), float(grid.qmax), 1.0, 1.0
    mantissa, exponent, high = FLOATS[grid.values]
    return -high, high, 2.0**exponent, 2.0**-mantissa
