"""Exponential functions that compile to vector instructions; a call to the C library would run them one at a
time.

    exp(x) = 2ⁿ (1 + u),  n = round(x / ln 2),  r = x - n ln 2 in two parts,  u = e^r - 1 = r + r² q(r)
    expm1, tanh, sigmoid from the same n and u;  log1p(y) = 2 artanh(y / (2 + y)) for 0 ≤ y ≤ 1

q and the series of artanh are interpolated at Chebyshev points: 1 + u is wrong by 2⁻²⁶ in float32 and 2⁻⁶¹ in
float64, so that results are within 3 units in the last place over the whole range: exp(-inf) = 0, small
results are denormal, large ones inf, NaN stays NaN. exp(0) = 1 and tanh(0) = 0 hold exactly. (σ is 0 where
its value would be denormal.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

# without "reassoc": rounding adds and subtracts a large number, and the two parts of ln 2 must not be joined
OPTIONS: Any = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "forceinline": True}
compiled = njit(**OPTIONS, cache=True)


@intrinsic
def wide(typing):
    """Loops of the function in which this stands use vectors as wide as the CPU has. LLVM halves them unless
    it is told: on some CPUs a few wide operations slow down what follows, which long polynomials make good.
    """

    def make(context, builder, signature, args):
        # past llvmlite, which knows only attributes without a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), make


def _parts32(x):
    """u and two factors of 2ⁿ: 2ⁿ itself may lie outside the normal numbers when the result does not."""
    x = np.float32(-104) if x < np.float32(-104) else x  # e^-104 rounds to 0
    x = np.float32(89) if x > np.float32(89) else x  # e^89 rounds to inf
    z = x * np.float32(1.4426950408889634) + np.float32(12582912)  # n is now in the lowest bits of z
    n = np.float32(z).view(np.int32) - np.int32(0x4B400000)
    k = z - np.float32(12582912)
    r = x - k * np.float32(0.693359375)
    r = r + k * np.float32(2.12194440e-4)
    q = np.float32(0.0013926183587713495)
    q = q * r + np.float32(0.0083631790527225774)
    q = q * r + np.float32(0.041666554617204574)
    q = q * r + np.float32(0.16666576989698776)
    q = q * r + np.float32(0.5)
    half = n >> np.int32(1)
    low = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    high = np.int32((n - half + np.int32(127)) << np.int32(23)).view(np.float32)
    return r * r * q + r, low, high


def _parts64(x):
    x = -746.0 if x < -746.0 else x
    x = 710.0 if x > 710.0 else x
    z = x * 1.4426950408889634 + 6755399441055744.0
    n = np.float64(z).view(np.int64) - np.int64(0x4338000000000000)
    k = z - 6755399441055744.0
    r = x - k * 6.93147180369123816490e-01
    r = r - k * 1.90821492927058770002e-10
    q = 2.0914686968086877233e-9
    q = q * r + 2.5105217004720745164e-8
    q = q * r + 2.7557273643110295328e-7
    q = q * r + 2.755725540020642443e-6
    q = q * r + 2.4801587325547741216e-5
    q = q * r + 0.00019841269874820625271
    q = q * r + 0.0013888888888883748305
    q = q * r + 0.0083333333333261351258
    q = q * r + 0.041666666666669755
    q = q * r + 0.16666666666666670991
    q = q * r + 0.5
    half = n >> 1
    low = np.int64((half + 1023) << 52).view(np.float64)
    high = np.int64((n - half + 1023) << 52).view(np.float64)
    return r * r * q + r, low, high


def _series32(z):
    """artanh(√z) / √z - 1, over z."""
    p = np.float32(0.11612460885607291)
    p = p * z + np.float32(0.10853230498597846)
    p = p * z + np.float32(0.14296182397598808)
    p = p * z + np.float32(0.1999985310341248)
    return p * z + np.float32(0.33333333660435752)


def _series64(z):
    p = 0.078157673537156122424
    p = p * z + 0.037458197303366327858
    p = p * z + 0.054226455163899063845
    p = p * z + 0.058671325896882965569
    p = p * z + 0.066675898307578551355
    p = p * z + 0.076922719588765822666
    p = p * z + 0.090909099496339794875
    p = p * z + 0.11111111099108056259
    p = p * z + 0.14285714285800132131
    p = p * z + 0.19999999999999760999
    return p * z + 0.33333333333333333443


def _parts(x):
    """(u, f, g) with e^x = (1 + u) f g."""


def _series(z):
    """The series of artanh beyond its first term."""


@overload(_parts, jit_options=OPTIONS)
def _(x):
    return _parts32 if x == types.float32 else _parts64


@overload(_series, jit_options=OPTIONS)
def _(z):
    return _series32 if z == types.float32 else _series64


@compiled
def exp(x):
    u, f, g = _parts(x)
    return (u + type(x)(1)) * f * g


@compiled
def expm1(x):
    """e^x - 1 for x ≤ 0."""
    u, f, g = _parts(x)
    scale = f * g
    return u * scale + (scale - type(x)(1))


@compiled
def tanh(x):
    e = expm1(type(x)(-2) * abs(x))
    y = -e / (e + type(x)(2))
    return y if x >= 0 else -y


@compiled
def sigmoid(x):
    return type(x)(1) / (type(x)(1) + exp(-x))


@compiled
def log_sigmoid(x):
    """log σ(x) = min(x, 0) - log1p(e^-|x|)."""
    e = exp(-abs(x))
    s = e / (e + type(x)(2))
    z = s * s
    series = s + s * z * _series(z)
    return (x if x < 0 else type(x)(0)) - (series + series)
