"""The libraries that GPU ops are compared with: one function a peer, from our arguments to a call of theirs.

`PEERS[form]` maps a peer's name to `make(*arguments) -> call`, where `call()` returns y. A peer is imported
when made, and the error is the table's entry if it cannot be. fla-core's gated backward refuses to run on
Hopper with Triton 3.4 to 3.7.0 because its gradients are wrong there at some sizes: its guard is lifted for
timing only.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from gpu_forms import FORMS, project

os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")  # its pure Triton kernels


def unguarded() -> None:
    import fla.ops.common.chunk_o

    fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True


def tune_few(count: int) -> None:
    """Let a peer's kernel choose among `count` of its launch configurations, evenly spread over all."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def few(self, kwargs):
        configs = list(every(self, kwargs))
        return configs[:: max(1, len(configs) // count)][:count]

    Autotuner.prune_configs = few


def simple_gla(q, k, v, g, u):
    from fla.ops.simple_gla import chunk_simple_gla

    unguarded()
    return lambda: chunk_simple_gla(q, k, v, g, scale=1.0)[0]


def gla(q, k, v, g, u):
    from fla.ops.gla import chunk_gla

    return lambda: chunk_gla(q, k, v, g, scale=1.0)[0]


def mamba(q, k, v, g, u):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = torch.full((v.shape[2],), -1.0, device=v.device)  # g = dt A
    return lambda: mamba_chunk_scan_combined(v, -g, A, k, q, chunk_size=256)


def xl_chunk(q, k, v, f, i):
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk.fwbw import mlstm_chunkwise__xl_chunk

    q, k, v, f, i = laid_out((q, k, v, f, i), 1, 2)
    call = lambda: mlstm_chunkwise__xl_chunk(q, k, v, i, f, autocast_kernel_dtype=v.dtype)  # noqa: E731
    call.inputs = (q, k, v, f, i)
    return call


def delta_rule(q, k, v, beta, g):
    from fla.ops.delta_rule import chunk_delta_rule

    return lambda: chunk_delta_rule(q, k, v, beta, scale=1.0)[0]


def gated_delta_rule(q, k, v, beta, g):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    unguarded()
    return lambda: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]


def kda(q, k, v, beta, g):
    from fla.ops.kda import chunk_kda

    return lambda: chunk_kda(q, k, v, g, beta, scale=1.0)[0]


def rwkv7(q, k, v, g, a, b):
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda: chunk_rwkv7(q, g, k, v, a, b, scale=1.0)[0]


def rwkv7_bounded(q, k, v, g, a, b):
    from fla.ops.rwkv7 import chunk_rwkv7

    return lambda: chunk_rwkv7(q, g, k, v, a, b, scale=1.0, lower_bound=-0.61)[0]


def sdpa(q, k, v):
    """Causal attention, which keeps all it has read."""
    q, k, v = laid_out((q, k, v), 1, 2)
    call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    call.inputs = (q, k, v)
    return call


def laid_out(tensors, *axes):
    """With two axes changed outside of what is timed, for who is written for that."""
    return tuple(x.detach().transpose(*axes).contiguous().requires_grad_() for x in tensors)


def accelerated_scan(a, b, kernel):
    """`warp` takes T a power of two. In bfloat16, where T is 4096 or more and memory begins at a multiple of
    16 bytes, it goes outside of it: it takes four numbers for 16 bytes. So there it begins elsewhere."""
    scan = import_module(f"accelerated_scan.{kernel}").scan
    a, b = laid_out((a, b), 1, 2)  # (B, D, T)
    if kernel == "warp" and a.element_size() == 2:
        a, b = (F.pad(x.flatten(), (1, 0))[1:].view_as(x).detach().requires_grad_() for x in (a, b))
    call = lambda: scan(a, b)  # noqa: E731
    call.inputs = (a, b)
    return call


def mamba_scan(x, dt, A, write, read):
    """CUDA kernels that mamba-ssm builds at installing, if told to, as the module `selective_scan_cuda`."""
    from selective_scan_cuda import bwd, fwd

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, dt, A, write, read):
            y, kept, *_ = fwd(x, dt, A, write, read, None, None, None, False)
            ctx.save_for_backward(x, dt, A, write, read, kept)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, kept = ctx.saved_tensors
            return tuple(bwd(*inputs, None, None, None, dy, kept, None, None, False, False)[:5])

    x, dt, write, read = laid_out((x, dt, write, read), 1, 2)  # (B, D, T)
    write, read = (v.detach().unsqueeze(1).requires_grad_() for v in (write, read))
    call = lambda: Scan.apply(x, dt, A, write, read)  # noqa: E731
    call.inputs = (x, dt, A, write, read)
    return call


def cudnn_lstm(x, W, R, c):
    """Of one head, whatever R is: cuDNN knows no others."""
    D = x.shape[-1]
    net = torch.nn.LSTM(D, D, batch_first=True).to(x)
    net.flatten_parameters()
    call = lambda: net(x)[0]  # noqa: E731
    call.inputs = (x, *net.parameters())
    return call


def flashrnn(x, W, R, c, backend):
    from flashrnn import flashrnn as run

    return lambda: run(project(x, W, R), R, c, function="lstm", backend=backend)[0][0].flatten(2)


def loop(x, W, R, c):
    """The definition, a step after the other."""
    return lambda: FORMS["lstm-full"].exact(x, W, R, c)


SCANS = {
    "accelerated-scan warp": partial(accelerated_scan, kernel="warp"),
    "accelerated-scan Triton": partial(accelerated_scan, kernel="scalar"),
}
PEERS = {
    "outer-head": {"fla simple_gla": simple_gla, "mamba-ssm SSD": mamba},
    "outer-key": {"fla gla": gla},
    "mlstm": {"mlstm_kernels xl_chunk": xl_chunk},
    "delta": {"fla delta_rule": delta_rule},
    "delta-head": {"fla gated_delta_rule": gated_delta_rule},
    "delta-key": {"fla kda": kda},
    "dplr": {"fla rwkv7": rwkv7, "fla rwkv7, bounded decay": rwkv7_bounded},
    "attention": {"PyTorch SDPA": sdpa},
    "diagonal-float32": SCANS,
    "diagonal": SCANS,
    "diagonal-complex": {"accelerated-scan Triton": partial(accelerated_scan, kernel="complex")},
    "selective": {"mamba-ssm selective scan": mamba_scan},
    "lstm-heads": {
        "cuDNN LSTM, full": cudnn_lstm,
        "flashrnn, CUDA": partial(flashrnn, backend="cuda_fused"),
        "flashrnn, Triton": partial(flashrnn, backend="triton_fused"),
    },
    "lstm-full": {"cuDNN LSTM": cudnn_lstm, "PyTorch loop": loop},
}
