"""The matrix memories on a GPU against the libraries in use: time, memory, first call, floor and error, one
table.

    python benchmarks/gpu_ops.py [--forms outer-head,delta] [--shapes 4x4096x16x128] [--no-peers] [--out FILE]

Every (form, shape, program) is first run in a process of its own, several at once, so that compiling and the
peers' autotuning are done and cached; then all are timed alone, one after another, in this process. Times are
medians of CUDA-event timings with a cold L2; memory is the peak above the inputs during forward + backward.
The floor is the larger of bytes (every input read and every output written once) over 4.3 TB/s and
multiplications of the chunkwise form over 790 TFLOP/s, both measured on an H200. Errors are relative norms
against the definition, folded in float64 over a sequence of 256 steps of the same widths.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import date
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_peers import PEERS

SHAPES = ["4x4096x16x128", "2x16384x16x128", "8x1024x8x64", "1x65536x16x128"]
BANDWIDTH, RATE = 4.3e12, 790e12
OURS = "riverrun"


def inputs(form: str, B: int, T: int, H: int, D: int, seed: int = 0) -> tuple:
    """Arguments as a trained model has them: unit keys, decays mostly near one, bfloat16 but for the
    gates."""
    make = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=make, device="cuda").to(dtype)

    def unit(*shape):
        return F.normalize(normal(*shape).float(), dim=-1).bfloat16()

    q, k, v = normal(B, T, H, D) * D**-0.5, unit(B, T, H, D), normal(B, T, H, D)
    per_head, per_key = (F.logsigmoid(normal(*s, dtype=torch.float32) + 3) for s in ((B, T, H), (B, T, H, D)))
    beta = normal(B, T, H).float().sigmoid().bfloat16()
    args = {
        "outer-head": (q, k, v, per_head, None),
        "outer-key": (q, k, v, per_key, None),
        "mlstm": (q, k, v, per_head, normal(B, T, H, dtype=torch.float32)),
        "delta": (q, k, v, beta, None),
        "delta-head": (q, k, v, beta, per_head),
        "delta-key": (q, k, v, beta, per_key),
        "dplr": (q, k, v, -0.6 * per_key.exp().bfloat16(), -k * beta[..., None], k),
    }[form]
    return tuple(None if x is None else x.detach().requires_grad_() for x in args)


def ours(form: str):
    from riverrun.kernels.gpu import delta, dplr, outer

    return {"outer": outer.outer, "mlstm": outer.mlstm, "delta": delta.delta, "dplr": dplr.dplr}[
        form.split("-")[0]
    ]


def program(form: str, name: str, args: tuple):
    """(call, the inputs whose gradients are asked for)."""
    if name == OURS:
        run = ours(form)
        return lambda: run(*args)[0], [x for x in args if x is not None]
    call = PEERS[form][name](*args)
    return call, [x for x in getattr(call, "inputs", args) if x is not None]


def both(call, wanted, dy):
    return torch.autograd.grad(call(), wanted, dy)


def measure(form: str, shape: str, name: str, rep: int = 60) -> dict[str, float]:
    from triton.testing import do_bench

    args = inputs(form, *map(int, shape.split("x")))
    call, wanted = program(form, name, args)
    begin = time.time()
    y = call()
    dy = torch.randn_like(y)
    both(call, wanted, dy)
    torch.cuda.synchronize()
    first = time.time() - begin
    del y
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both(call, wanted, dy)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    with torch.no_grad():
        forward = do_bench(call, warmup=20, rep=rep, return_mode="median")
    whole = do_bench(lambda: both(call, wanted, dy), warmup=20, rep=2 * rep, return_mode="median")
    return {"forward": forward, "both": whole, "MiB": peak, "first": first}


@cache
def error(form: str, D: int) -> float:
    """The largest relative error of ours over y and all gradients, K = V = D."""
    from riverrun.recurrences import delta, dplr, mlstm, outer
    from riverrun.recurrences.fold import fold

    rule = form.split("-")[0]
    meaning = {"outer": outer.outer, "mlstm": mlstm.mlstm, "delta": delta.delta, "dplr": dplr.dplr}[rule]
    args = inputs(form, 2, 256, 2, D)
    exact = tuple(None if x is None else x.detach().double().requires_grad_() for x in args)
    y, y64 = ours(form)(*args)[0], fold(meaning, exact)[0]
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x for x in args if x is not None], dy)
    true = torch.autograd.grad(y64, [x for x in exact if x is not None], dy.double())
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip((y, *found), (y64, *true), strict=True)
    )


def floor(form: str, shape: str) -> tuple[float, float]:
    """Least milliseconds of forward and of forward + backward."""
    B, T, H, D = map(int, shape.split("x"))
    sequences = {"outer": 3, "mlstm": 3, "delta": 3, "dplr": 5}[form.split("-")[0]]
    gate = 4 if form.endswith("key") else 2 if form == "dplr" else 0
    read = B * T * H * D * (2 * sequences + gate)
    write = 2 * B * T * H * D
    C = 64
    pair, state = (
        2 * C * D,
        2 * D * D,
    )  # multiplications and additions a step, of a (C, C) and a (K, V) product
    products = {"outer": (2, 2), "mlstm": (2, 2), "delta": (4, 3), "dplr": (7, 4)}[form.split("-")[0]]
    work = B * T * H * (products[0] * pair / 2 + products[1] * state)
    forward = max((read + write) / BANDWIDTH, work / RATE)
    backward = max((2 * read + 2 * write) / BANDWIDTH, 2.5 * work / RATE)
    return forward * 1e3, (forward + backward) * 1e3


def guarded(run, *args):
    try:
        return run(*args)
    except Exception as trouble:
        return f"{type(trouble).__name__}: {str(trouble).splitlines()[0][:90] if str(trouble) else ''}"


def table(forms, shapes, peers: bool, write) -> None:
    """One row a program, shape by shape; `write` gets all rows so far whenever some are done."""
    lines = ["| op | (B,T,H,D) | program | forward ms | fwd+bwd ms | of best peer | of floor "
             "| MiB | first call s | error |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for shape in shapes:
        for form in forms:
            names = [OURS, *(PEERS[form] if peers else [])]
            found = {name: guarded(measure, form, shape, name) for name in names}
            best = [min((r[key] for n, r in found.items() if n != OURS and isinstance(r, dict)), default=None)
                    for key in ("forward", "both")]  # fmt: skip
            low = floor(form, shape)
            for name, r in found.items():
                if isinstance(r, str):
                    lines.append(f"| {form} | {shape} | {name} | {r} | | | | | | |")
                    continue
                of = [r[key] / b if b and name == OURS else None for key, b in zip(("forward", "both"), best)]
                ratio = " / ".join("" if x is None else f"{x:.2f}" for x in of) if name == OURS else ""
                wrong = guarded(error, form, int(shape.split("x")[3])) if name == OURS else ""
                wrong = f"{wrong:.1e}" if isinstance(wrong, float) else wrong
                lines.append(
                    f"| {form} | {shape} | {name} | {r['forward']:.3f} | {r['both']:.3f} | {ratio} | "
                    f"{r['forward'] / low[0]:.1f} / {r['both'] / low[1]:.1f} | {r['MiB']:.0f} "
                    f"| {r['first']:.1f} | {wrong} |"
                )
            print("\n".join(lines[-len(found) :]), flush=True)
            write(lines)


def compile_first(forms, shapes, peers: bool, seconds: float) -> dict[str, str]:
    """Run every program once, all at the same time, in processes of their own; the first calls' seconds."""
    begin = time.time()
    jobs = {}
    for form in forms:
        for name in [OURS, *(PEERS[form] if peers else [])]:
            command = [sys.executable, __file__, "--one", form, name, *shapes]
            jobs[form, name] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    notes = {}
    for (form, name), job in jobs.items():
        try:
            out = job.communicate(timeout=max(1.0, seconds - (time.time() - begin)))[0]
        except subprocess.TimeoutExpired:
            job.kill()
            out = "stopped: out of time"
        notes[f"{form}: {name}"] = out.strip().splitlines()[-1] if out.strip() else "no output"
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", default=",".join(PEERS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for compiling everything")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        form, name, *shapes = a.one
        print(
            " ".join(str(guarded(lambda s: f"{measure(form, s, name, 1)['first']:.1f}", s)) for s in shapes)
        )
        return
    forms, shapes = a.forms.split(","), a.shapes.split(",")
    import triton

    notes = compile_first(forms, shapes, not a.no_peers, a.seconds)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    head = [f"{date.today()}, {torch.cuda.get_device_name()}, {versions}",
            f"`{' '.join(sys.argv)}`", "",
            "First calls with an empty cache, all programs compiling at once, seconds by shape:", "",
            *[f"- {k}: {v}" for k, v in notes.items()], ""]  # fmt: skip
    print("\n".join(head), flush=True)

    def write(lines: list[str]) -> None:
        if a.out:
            a.out.write_text("\n".join(head + lines) + "\n")

    table(forms, shapes, not a.no_peers, write)


if __name__ == "__main__":
    main()
