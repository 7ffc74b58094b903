"""Scans, cells, softmax, convolution and norm on a GPU: the doctor's verdicts, then times beside PyTorch's.

    python benchmarks/gpu_scans.py [--check] [--time] [--ops diagonal,lstm]      both parts by default

Times are medians of replays of a CUDA graph, so the time of the GPU alone, forward, and forward with
backward, on random inputs. The floor is the bytes an op must move, every input read and every output
written once, over the bandwidth of a large kernel measured in the same run. "first call": the first forward
and backward of these dtypes and shapes with no kernel cached; not given if TRITON_CACHE_DIR is set. Libraries
beside PyTorch are in `gpu_ops.py`.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time

import torch
import torch.nn.functional as F
from triton.testing import do_bench, do_bench_cudagraph

from riverrun import doctor, ops
from riverrun.commands.doctor import report
from riverrun.kernels.gpu.norm import gated_rms_norm
from riverrun.testing import inputs

OPS = ("diagonal", "selective", "softmax", "short_conv", "elman", "lstm", "gru", "slstm")
DEVICE = "cuda"
FRESH = "TRITON_CACHE_DIR" not in os.environ  # no kernel is there yet


def check(names: list[str]) -> None:
    """The doctor on every op."""

    def say(verdict: doctor.Verdict) -> None:
        print(report([verdict], DEVICE).splitlines()[2], flush=True)

    doctor.run(DEVICE, ops=names, impls=["gpu"], remember=False, progress=say, jobs=os.cpu_count())


def measure(f) -> float:
    return do_bench_cudagraph(f, rep=30, return_mode="median")


def both(call, args, weights=()) -> tuple[float, float, float]:
    """Milliseconds forward, and forward and backward, and MiB of the latter above its inputs."""
    args = [x.detach().requires_grad_() if x is not None else None for x in args]
    wanted = [*(x for x in args if x is not None), *weights]
    with torch.no_grad():
        dy = torch.randn_like(call(*args))

    def step():
        return torch.autograd.grad(call(*args), wanted, dy)

    def forward():
        with torch.no_grad():
            call(*args)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return measure(forward), measure(step), peak


def bandwidth() -> float:
    """Bytes a second that a kernel can read and write; a copy in a graph runs on the slower copy engine."""
    x = torch.randn(2**28, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (measure(lambda: torch.neg(x, out=y)) * 1e-3)


def row(name: str, shape, dtype, times, floor=None, first=None) -> None:
    kind = str(dtype).removeprefix("torch.") if dtype else ""
    floors = "" if floor is None else f"{floor[0]:.3f} / {floor[1]:.3f}"
    first = "" if first is None else f"{first:.1f}"
    f, fb, peak = times
    print(f"| {name} | {shape} | {kind} | {f:.3f} / {fb:.3f} | {floors} | {peak:.0f} | {first} |", flush=True)


def ours(name: str, args, floor_bytes, rate, note="") -> None:
    op = ops.OPS[name]
    start = time.perf_counter()
    leaves = [x.detach().requires_grad_() for x in args if x is not None]
    y, _ = op(*[None if x is None else leaves.pop(0) for x in args], impl="gpu")
    y.abs().sum().backward()
    torch.cuda.synchronize()
    first = time.perf_counter() - start if FRESH else None
    times = both(lambda *a: op(*a, impl="gpu")[0], args)
    floor = [1e3 * b / rate for b in floor_bytes]
    row(f"**{name}**{note}", tuple(args[0].shape), args[0].dtype, times, floor, first)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def diagonal(rate: float) -> None:
    for shape in ((8, 4096, 2048), (1, 65536, 2048), (1, 65536, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.rand(shape, device=DEVICE).to(dtype), randn(*shape, dtype=dtype)
            ours("diagonal", (a, b), (3 * a.nbytes, 8 * a.nbytes), rate)
        gc.collect()
        torch.cuda.empty_cache()
    a, b = randn(4, 4096, 1024, dtype=torch.complex64) * 0.5, randn(4, 4096, 1024, dtype=torch.complex64)
    ours("diagonal", (a, b), (3 * a.nbytes, 8 * a.nbytes), rate)


def selective(rate: float) -> None:
    B, T, E, N = 8, 4096, 2048, 16
    for dtype in (torch.bfloat16, torch.float32):
        x, dt = randn(B, T, E, dtype=dtype), F.softplus(randn(B, T, E) - 1).to(dtype)
        A = -torch.rand(E, N, device=DEVICE) * 4
        B_, C = randn(B, T, N, dtype=dtype), randn(B, T, N, dtype=dtype)
        ours("selective", (x, dt, A, B_, C), (3 * x.nbytes, 8 * x.nbytes), rate, note=f" N={N}")


def softmax(rate: float) -> None:
    B, T, H, V = 8, 4096, 16, 128
    for dtype in (torch.bfloat16, torch.float32):
        s, v = randn(B, T, H, dtype=dtype), randn(B, T, H, V, dtype=dtype)
        ours("softmax", (s, v), (2 * v.nbytes, 6 * v.nbytes), rate)
        row(
            "  parallel PyTorch scan",
            tuple(v.shape),
            dtype,
            both(lambda s, v: ops.softmax(s, v, impl="scan")[0], (s, v)),
        )


def short_conv(rate: float) -> None:
    B, T, D, W = 8, 4096, 2048, 4
    for dtype in (torch.bfloat16, torch.float32):
        x, w = randn(B, T, D, dtype=dtype), randn(D, W, dtype=dtype)
        ours("short_conv", (x, w, None), (2 * x.nbytes, 5 * x.nbytes), rate)
        peer = lambda x, w: F.conv1d(F.pad(x.mT, (W - 1, 0)), w[:, None], groups=D).mT  # noqa: E731
        row("  F.conv1d, depthwise", tuple(x.shape), dtype, both(peer, (x, w)))


def cells(rate: float) -> None:
    B, T, H, P = 16, 1024, 12, 64
    dtype = torch.bfloat16
    for name, gates in (("lstm", 4), ("gru", 3), ("slstm", 4), ("elman", 1)):
        x = randn(B, T, gates, H, P, dtype=dtype)
        R, c = randn(gates, H, P, P, dtype=dtype) / 16, randn(gates, H, P, dtype=dtype)
        y = B * T * H * P * 2
        ours(name, (x, R, c), (x.nbytes + y, 3 * x.nbytes + 3 * y), rate)
    for name, H, P, dtype in (("lstm", 6, 128, torch.bfloat16), ("lstm", 12, 64, torch.float32)):
        x = randn(B, T, 4, H, P, dtype=dtype)
        R, c = randn(4, H, P, P, dtype=dtype) / 16, randn(4, H, P, dtype=dtype)
        ours(name, (x, R, c), (1.25 * x.nbytes, 3.75 * x.nbytes), rate)
    for dtype in (torch.bfloat16, torch.float32):
        for name, gates in (("lstm", 4), ("gru", 3), ("slstm", 4), ("elman", 1)):
            x, y = randn(B, T, gates, 1, 768, dtype=dtype), B * T * 768 * dtype.itemsize
            R, c = randn(gates, 1, 768, 768, dtype=dtype) / 55, randn(gates, 1, 768, dtype=dtype)
            ours(name, (x, R, c), (x.nbytes + y, 3 * x.nbytes + 3 * y), rate, note=", full recurrence")
        for shape in ((16, 1024, 768), (8, 512, 256), (64, 1024, 768), (16, 1024, 1024)):
            full_recurrence(shape, dtype)


def full_recurrence(shape, dtype) -> None:
    """One head, with the input projection, beside cuDNN's networks, which have it."""
    B, T, P = shape
    x, W = randn(*shape, dtype=dtype), randn(4 * P, P, dtype=dtype) / P**0.5
    R, c = randn(4, 1, P, P, dtype=dtype) / (2 * P**0.5), randn(4, 1, P, dtype=dtype)

    def call(x, W, R, c):
        return ops.lstm((x @ W.T).view(B, T, 4, 1, P), R, c, impl="gpu")[0]

    row("**lstm**, full recurrence, with its input projection", shape, dtype, both(call, (x, W, R, c)))
    for network in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        net = network(P, P, batch_first=True).to(DEVICE, dtype)
        net.flatten_parameters()
        times = both(lambda x: net(x)[0], (x,), list(net.parameters()))  # noqa: B023
        row(f"  cuDNN {network.__name__}, with its input projection", shape, dtype, times)


def norm(rate: float) -> None:
    shape, group = (8, 4096, 2048), 128
    for dtype in (torch.bfloat16, torch.float32):
        x, z, w = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[-1])
        times = both(lambda x, z, w: gated_rms_norm(x, z, w, group), (x, z, w))
        row("**gated RMS norm**", shape, dtype, times, [1e3 * n * x.nbytes / rate for n in (3, 8)])

        def eager(x, z, w):
            u = F.rms_norm(x.float().unflatten(-1, (-1, group)), (group,), eps=1e-6) * w.view(-1, group)
            return (u.flatten(-2) * F.silu(z.float())).to(x.dtype)

        row("  PyTorch", shape, dtype, both(eager, (x, z, w)))


def decode(name: str) -> None:
    """One step, captured in a CUDA graph and replayed: the same bits as without, and both times."""
    size = inputs.Size(B=16, T=1, H=12, K=64, V=64, D=2048, N=16, P=64)
    case = inputs.make(name, inputs.FORMS[name][0], size).to(torch.bfloat16, DEVICE)

    def step():
        return ops.OPS[name](*case.args, state=case.state, impl="gpu")[0]

    with torch.no_grad():
        y = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = step()
        z.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same, replay, eager = torch.equal(y, z), measure(step), do_bench(step, return_mode="median")
    print(f"step of {name}: replayed {1e3 * replay:.1f} us, eager {1e3 * eager:.1f} us, same bits {same}")


PARTS = {
    "selective": selective,
    "softmax": softmax,
    "short_conv": short_conv,
    "cells": cells,
    "norm": norm,
    "diagonal": diagonal,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--ops", default=",".join(OPS))
    chosen = parser.parse_args()
    names = chosen.ops.split(",")
    everything = not (chosen.check or chosen.time)
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())  # so that the first call is a first call
    if chosen.time or everything:
        rate = bandwidth()
        print(f"{doctor.store.machine('cuda')}; {rate / 1e12:.2f} TB/s")
        print("| op | shape | dtype | ms forward / + backward | floor | MiB | first call s |")
        print("|---|---|---|---|---|---|---|")
        for part, run in PARTS.items():
            if part in names or (part in ("cells", "norm") and "lstm" in names):
                try:
                    run(rate)
                except Exception as problem:  # the other parts are still worth their time
                    print(f"{part}: {type(problem).__name__}: {str(problem)[:300]}")
                gc.collect()
                torch.cuda.empty_cache()
        for name in names:
            decode(name)
    if chosen.check or everything:
        check(names)


if __name__ == "__main__":
    main()
