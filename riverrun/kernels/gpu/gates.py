"""One step of each nonlinear cell and its derivative, on tiles in float32, for the kernels that run them.

    state' = advance(x, p, state)         p = R h + c, one tile a gate
    gradients of p, and of the state that entered = retreat(x, p, state, gradients of state')

Equations and the order of gates: `riverrun.recurrences.cell`. A cell with fewer than four gates or states
passes others' tiles in the places it does not use, and nobody reads them.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def get(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def optional(x, at, inside):
    """x[at], or zeros where there is no x."""
    return tl.zeros(at.shape, tl.float32) if x is None else get(x, at, inside)


@triton.jit
def get_gates(x, at, stride, inside, GATES: tl.constexpr):
    """The four gates' x at one step; those a cell lacks repeat the first and are not read."""
    x0 = get(x, at, inside)
    x1, x2, x3 = x0, x0, x0
    if GATES > 1:
        x1, x2 = get(x, at + stride, inside), get(x, at + 2 * stride, inside)
    if GATES > 3:
        x3 = get(x, at + 3 * stride, inside)
    return x0, x1, x2, x3


@triton.jit
def put_gates(x, at, stride, inside, x0, x1, x2, x3, GATES: tl.constexpr):
    dtype: tl.constexpr = x.dtype.element_ty
    tl.store(x + at, x0.to(dtype), mask=inside)
    if GATES > 1:
        tl.store(x + at + stride, x1.to(dtype), mask=inside)
        tl.store(x + at + 2 * stride, x2.to(dtype), mask=inside)
    if GATES > 3:
        tl.store(x + at + 3 * stride, x3.to(dtype), mask=inside)


@triton.jit
def advance(x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, inside, KIND: tl.constexpr):
    """h, s, n, m after the step."""
    if KIND == "elman":
        h = tanh(x0 + p0)
    elif KIND == "lstm":
        s = tl.sigmoid(x1 + p1) * s + tl.sigmoid(x0 + p0) * tanh(x2 + p2)
        h = tl.sigmoid(x3 + p3) * tanh(s)
    elif KIND == "gru":
        update = tl.sigmoid(x1 + p1)
        h = update * h + (1 - update) * tanh(x2 + tl.sigmoid(x0 + p0) * p2)
    else:
        kept, write = log_sigmoid(x1 + p1) + m, x0 + p0
        m = tl.maximum(kept, write)
        kept, write = tl.exp(kept - m), tl.exp(write - m)
        s, n = kept * s + write * tanh(x2 + p2), kept * n + write
        h = tl.sigmoid(x3 + p3) * s / tl.where(inside, n, 1.0)
    return h, s, n, m


@triton.jit
def retreat(x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, dh, ds, dn, dm, inside, KIND: tl.constexpr):
    """Gradients of the gates' arguments, then that of what the GRU's candidate reads from R, then those of
    the entering h without what comes through R, and of s, n, m."""
    d0, d1, d2, d3 = dh, dh, dh, dh
    direct = tl.zeros(dh.shape, tl.float32)
    if KIND == "elman":
        out = tanh(x0 + p0)
        d0 = dh * (1 - out * out)
    elif KIND == "lstm":
        write, forget = tl.sigmoid(x0 + p0), tl.sigmoid(x1 + p1)
        z, gate = tanh(x2 + p2), tl.sigmoid(x3 + p3)
        out = tanh(forget * s + write * z)
        d3 = dh * out * gate * (1 - gate)
        ds += dh * gate * (1 - out * out)
        d0, d1 = ds * z * write * (1 - write), ds * s * forget * (1 - forget)
        d2 = ds * write * (1 - z * z)
        ds = ds * forget
    elif KIND == "gru":
        ask, update = tl.sigmoid(x0 + p0), tl.sigmoid(x1 + p1)
        z = tanh(x2 + ask * p2)
        d1 = dh * (h - z) * update * (1 - update)
        d2 = dh * (1 - update) * (1 - z * z)
        d0 = d2 * p2 * ask * (1 - ask)
        direct = dh * update
    else:
        lf = log_sigmoid(x1 + p1)
        kept, write = lf + m, x0 + p0
        top = tl.maximum(kept, write)
        above = tl.where(kept > write, 1.0, tl.where(kept == write, 0.5, 0.0))
        forget, put = tl.exp(kept - top), tl.exp(write - top)
        z, gate = tanh(x2 + p2), tl.sigmoid(x3 + p3)
        total = tl.where(inside, forget * n + put, 1.0)
        ratio = (forget * s + put * z) / total
        d3 = dh * ratio * gate * (1 - gate)
        ds += dh * gate / total
        dn -= dh * gate * ratio / total
        d_forget, d_put = (ds * s + dn * n) * forget, (ds * z + dn) * put
        left = dm - d_forget - d_put
        dm = d_forget + left * above
        d0, d1 = d_put + left * (1 - above), dm * (1 - tl.exp(lf))
        d2 = ds * put * (1 - z * z)
        ds, dn = ds * forget, dn * forget
    dq = d2
    if KIND == "gru":
        dq = d2 * tl.sigmoid(x0 + p0)
    return d0, d1, d2, d3, dq, direct, ds, dn, dm
