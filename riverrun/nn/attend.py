"""Causal softmax attention whose state is a value: keys and values so far, or the last window - 1 of them.

    y_t = Σ_s softmax_s(q_tᵀ k_s / sqrt(K)) v_s    s ≤ t in t's own document, s > t - window if there is one

    q, y: (B, T, H, K)    k, v: (B, T, G, K), head h reads group h // (H / G)
    state: (kv (B, 2G, n, K), start (B), filled (B)): keys above values; where in kv the current document
    starts, negative when that is forgotten; how far the memory behind kv is taken

Without gradients a step is appended in place. kv is then a view of a longer buffer, and all states on it
share `filled`: only a state that ends there may write on, any other copies. So an older state, or one state
twice, can be continued as if nothing were ever overwritten. With gradients, and compiled, nothing is.

`room` makes a state whose size no step changes, for steps that are recorded: there kv is a whole buffer,
which steps overwrite, and `filled`, int32 and beside kv, is how many of its steps count.
Sources: Vaswani et al. 2017 (arXiv:1706.03762) eq. 1; the window, Beltagy et al. 2020 (arXiv:2004.05150).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from riverrun.ops import gpu
from riverrun.state import State, describe

from .check import head_width
from .rotary import positions, rotate_all

Cache = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]

# without cuDNN's, which takes milliseconds to plan for each new length of a cache
STEADY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    reset: Tensor | None = None,
    window: int | None = None,
    base: float = 10_000.0,
    always: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """y and the state after the last step; q and k are turned here, by rotary positions of that `base`.

    `always` (2G, P, K), keys above values, is what every step sees beside its window, wherever it stands.
    """
    T, fresh = k.shape[1], state[0] is None
    past, start, filled = begin(k, window) if fresh else checked(state, k, window)
    if filled.dtype == torch.int32:
        return within(q, k, v, (past, start, filled), reset, base)
    position = positions(k, past.shape[2] - start, reset)[0]
    plain = q.transpose(1, 2)
    q, k = rotate_all((q, k), position, base)
    q = q.transpose(1, 2)
    kv, filled = append(past, filled, torch.cat([k, v], 2).transpose(1, 2), None if window else start)
    n = kv.shape[2] - T
    first = torch.arange(n, n + T, device=k.device) - position  # where in kv the document of each step starts
    if window is None:
        if always is not None:
            raise ValueError("attention: `always` is for a window; without one, every step sees every key")
        whole = fresh and reset is None  # on a GPU it is read past the copies that the state is
        seen = (k.transpose(1, 2), v.transpose(1, 2)) if whole and q.is_cuda else halves(q, kv)
        y = read(q, seen, None if whole or all_seen(start, T, reset) else visible(first, n, n + T))
        return y, (kv, first[:, -1], filled)
    ys = []
    for i in range(0, T, window):  # blocks of `window` steps see at most 2 · window - 1: linear in T
        near = first[:, i : i + window] - i
        j = i + near.shape[1]
        beside = None if always is None else (always, plain[:, :, i:j])
        ys.append(read(q[:, :, i:j], halves(q, kv[:, :, i : n + j]), visible(near, n, window), beside))
    last = kv[:, :, T:].clone() if n <= T else kv[:, :, T:]  # a view would keep all T steps in memory
    return torch.cat(ys, 1), (last, first[:, -1] - T, filled)


def room(state: Cache, steps: int) -> Cache:
    """A copy of the state of attention without a window, with room for so many steps more."""
    kv, start, _ = state
    B, G, n, K = kv.shape
    buffer = kv.new_zeros(B, G, n + steps, K)
    buffer[:, :, :n] = kv
    return buffer, start.clone(), torch.full((B,), n, dtype=torch.int32, device=kv.device)


def trimmed(state: Cache, left: int) -> Cache:
    """The state that `room` and the steps since have made, without the `left` steps of room; kv is a view."""
    kv, start, _ = state
    return kv[:, :, : kv.shape[2] - left], start, torch.full((len(kv),), -1)


def within(
    q: Tensor, k: Tensor, v: Tensor, state: Cache, reset: Tensor | None, base: float
) -> tuple[Tensor, Cache]:
    """`attend` in a state with room, which it overwrites; on a GPU nothing here asks how much there is."""
    (kv, start, filled), T = state, k.shape[1]
    if reset is not None or torch.is_grad_enabled():
        raise ValueError(
            "attention: a state with room is overwritten by its steps, so it takes neither `reset` nor "
            "gradients; continue the state it was made from, or under torch.no_grad()"
        )
    at = filled[:, None] + torch.arange(T, device=k.device)
    position = at - start[:, None]
    q, k = rotate_all((q, k), position, base)
    kv.index_copy_(2, at[0], torch.cat([k, v], 2).transpose(1, 2).to(kv.dtype))
    if gpu is not None and T == 1 and gpu.attend.refuses(q, kv) is None:
        y = gpu.attend.attend(q[:, 0], kv, start, filled)[:, None]
    else:
        steps = torch.arange(kv.shape[2], device=k.device)
        mask = (steps >= start[:, None, None]) & (steps <= at[..., None])
        y = read(q.transpose(1, 2), halves(q, kv), mask[:, None])
    return y, (kv, start, filled + T)


def pairs(width: int, num_heads: int, window: int | None = None) -> int:
    """K = width / num_heads, turned in pairs. Raises ValueError if it is odd, or for a window of one step."""
    K = head_width(width, num_heads)
    if K % 2 or (window is not None and window < 2):
        raise ValueError(f"heads of width {K}, window {window}: it takes an even width and ≥ 2 steps")
    return K


def grouped(num_heads: int, num_key_heads: int | None) -> int:
    """G: as many as there are heads unless given. Raises ValueError if it does not divide them."""
    G = num_key_heads or num_heads
    head_width(num_heads, G, "num_key_heads", "num_heads")
    return G


def begin(k: Tensor, window: int | None) -> Cache:
    """Nothing; in a window zeros that nobody sees, so that its size never changes."""
    B, _, G, K = k.shape
    n = 0 if window is None else window - 1
    return k.new_zeros(B, 2 * G, n, K), torch.full((B,), n, device=k.device), torch.full((B,), -1)


def checked(state: Cache, k: Tensor, window: int | None) -> Cache:
    B, _, G, K = k.shape
    cached = isinstance(state[0], Tensor) and state[0].dim() == 4
    n = window - 1 if window else state[0].shape[2] if cached else "n"
    expected = f"(({B}, {2 * G}, {n}, {K}), ({B},), ({B},))"
    if describe(state) != expected:
        raise ValueError(
            f"attention: the state has shape {describe(state)}; it must be {expected}: a state continues "
            "only the mixer and the batch size that made it"
        )
    return state


def all_seen(start: Tensor, T: int, reset: Tensor | None) -> bool:
    """Whether every step sees all steps before it. It is asked of several, for asking waits for a GPU."""
    return T > 1 and reset is None and not torch.compiler.is_compiling() and int(start.max()) <= 0


def visible(first: Tensor, n: int, window: int) -> Tensor:
    """(B, 1, t, n + t): step i, at n + i, sees itself and window - 1 before it, from `first` (B, t) on."""
    steps = torch.arange(n + first.shape[1], device=first.device)
    here = steps[n:]
    low = torch.maximum(first, here - (window - 1))
    return ((steps >= low[..., None]) & (steps <= here[:, None]))[:, None]


def halves(q: Tensor, kv: Tensor) -> Pair:
    """Keys and values of kv (B, 2G, s, K), in the dtype of q."""
    k, v = kv.to(q.dtype).chunk(2, 1)
    return k, v


def read(q: Tensor, kv: Pair, mask: Tensor | None, beside: Pair | None = None) -> Tensor:
    """(B, t, H, K) for q (B, H, t, K) and k, v (B, G, s, K); no mask means causal, the last t of s steps.

    `beside` is (always, q before it was turned): one softmax, by keys that are zero for the other q.
    """
    (k, v), K = kv, q.shape[-1]
    gqa = q.shape[1] != k.shape[1]
    if beside is not None and mask is not None:
        always, plain = beside
        a, b = always.to(q.dtype).expand(len(q), *always.shape).chunk(2, 1)
        q, mask = torch.cat([q, plain], -1), F.pad(mask, (always.shape[1], 0), value=True)
        k, v = torch.cat([F.pad(a, (K, 0)), F.pad(k, (0, K))], 2), torch.cat([b, v], 2)
    chosen = mask is not None and q.is_cuda and not torch.compiler.is_compiling()
    causal = mask is None and q.shape[2] == k.shape[2]
    if mask is None and not causal:
        mask = causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(STEADY) if chosen else nullcontext():
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa, scale=K**-0.5
        )
    return y.transpose(1, 2)


def append(past: Tensor, filled: Tensor, new: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """`new` behind `past`, and how far their memory is taken. A copy drops what is before every `start`."""
    n, T = past.shape[2], new.shape[2]
    compiling = torch.compiler.is_compiling()
    writable = not (torch.is_grad_enabled() or compiling)
    if writable and past.dtype == new.dtype and (found := behind(past, filled, T)):
        buffer, end = found
        buffer[:, :, end : end + T] = new
        return buffer[:, :, end - n : end + T], filled.fill_(end + T)
    if start is not None and n and not compiling:
        past = past[:, :, int(start.min().clamp(0, n)) :]
    alone = new.is_cuda and not n and not writable
    kv = new if alone else torch.cat([past, new], 2)  # which copies, slowly for what is transposed
    filled = torch.full(kv.shape[:1], kv.shape[2])  # on the CPU, where reading it waits for nothing
    if not writable or n < T:
        return kv, filled
    # room for as much again: appending a step costs the same on average however long the past is
    return torch.cat([kv, torch.empty_like(kv)], 2)[:, :, : kv.shape[2]], filled


def behind(x: Tensor, filled: Tensor, steps: int) -> tuple[Tensor, int] | None:
    """The buffer that x (B, G, n, K) is a view of, and where x ends in it, if `steps` more may be written."""
    B, G, n, K = x.shape
    size = x.stride(1) // K
    if not n or not size or x.stride() != (G * size * K, size * K, K, 1):
        return None
    skipped = x.storage_offset() // K % size
    begin, end = x.storage_offset() - skipped * K, skipped + n
    inside = end + steps <= size and begin + B * G * size * K <= x.untyped_storage().nbytes() // x.itemsize
    frozen = x.is_inference() and not torch.is_inference_mode_enabled()
    if not inside or frozen or not bool((filled == end).all()):
        return None
    return x.as_strided((B, G, size, K), x.stride(), begin), end
