"""The matrix memories on a GPU against the libraries in use: time, memory, first call, floor and error, one
table.

    python benchmarks/gpu_ops.py [--forms outer-head,delta] [--shapes 4x4096x16x128] [--no-peers] [--out FILE]

Every (form, program) is a process. For each shape all compile, and peers tune themselves, at the same time;
then each is told to time itself while all others wait. Who is not ready after `--seconds` is left out. Times
are medians of CUDA-event timings with a cold L2; memory is the peak above the inputs during a forward and its
backward. The floor is the larger of bytes (every input read and every output written once) over 4.3 TB/s and
multiplications of the chunkwise form over 790 TFLOP/s, both measured on an H200. Errors are relative norms
against the definition, folded in float64 over a sequence of 256 steps of the same widths.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from datetime import date
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_peers import PEERS, tune_few

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


def prepare(form: str, shape: str, name: str):
    """(call, wanted inputs, gradient of y, seconds of the first forward + backward)."""
    args = inputs(form, *map(int, shape.split("x")))
    call, wanted = program(form, name, args)
    begin = time.time()
    dy = torch.randn_like(call())
    both(call, wanted, dy)
    torch.cuda.synchronize()
    return call, wanted, dy, time.time() - begin


def measure(call, wanted, dy, rep: int = 60) -> dict[str, float]:
    from triton.testing import do_bench

    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both(call, wanted, dy)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    with torch.no_grad():
        forward = do_bench(call, warmup=20, rep=rep, return_mode="median")
    whole = do_bench(lambda: both(call, wanted, dy), warmup=20, rep=2 * rep, return_mode="median")
    return {"forward": forward, "both": whole, "MiB": peak}


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


def say(word: str, value) -> None:
    print(json.dumps([word, value]), flush=True)


def worker(form: str, name: str, shapes: list[str]) -> None:
    """One program: for each shape waits for a line, says that it is ready, waits, says what it measured."""
    for shape in shapes:
        sys.stdin.readline()
        try:
            call, wanted, dy, first = prepare(form, shape, name)
            wrong = error(form, int(shape.split("x")[3])) if name == OURS else None
            say("ready", None)
            sys.stdin.readline()
            say("done", {**measure(call, wanted, dy), "first": first, "error": wrong})
            del call, wanted, dy
            torch.cuda.empty_cache()
        except Exception as trouble:
            text = str(trouble).splitlines() or [""]
            say("failed", f"{type(trouble).__name__}: {text[0][:90]}")


class Program:
    """A worker and what it says."""

    def __init__(self, form: str, name: str, shapes: list[str], configs: int) -> None:
        self.form, self.name = form, name
        command = [sys.executable, __file__, "--configs", str(configs), "--one", form, name, *shapes]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith("["):  # libraries print too
                self.said.put(line)
        self.said.put(None)

    def hear(self, seconds: float):
        """(word, value), or why there is none."""
        try:
            line = self.said.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.process.kill()
            return "failed", "not ready in time"
        if line is None:
            self.said.put(None)
            return "failed", "stopped at an earlier shape"
        return json.loads(line)

    def tell(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()


def rows(shape: str, heard: dict[Program, dict | str]) -> list[str]:
    lines = []
    for program, r in heard.items():
        head = f"| {program.form} | {shape} | {program.name}"
        if isinstance(r, str):
            lines.append(f"{head} | {r} | | | | | | |")
            continue
        ratio = ""
        if program.name == OURS:
            peers = [x for p, x in heard.items() if p.form == program.form and p.name != OURS]
            best = [min((x[key] for x in peers if not isinstance(x, str)), default=None)
                    for key in ("forward", "both", "MiB")]  # fmt: skip
            found = (r["forward"], r["both"], r["MiB"])
            ratio = " / ".join("" if b is None else f"{x / b:.2f}" for x, b in zip(found, best, strict=True))
        low = floor(program.form, shape)
        wrong = "" if r["error"] is None else f"{r['error']:.1e}"
        lines.append(
            f"{head} | {r['forward']:.3f} | {r['both']:.3f} | {ratio} | {r['forward'] / low[0]:.1f} / "
            f"{r['both'] / low[1]:.1f} | {r['MiB']:.0f} | {r['first']:.1f} | {wrong} |"
        )
    return lines


def compare(forms, shapes, peers: bool, configs: int, seconds: float, write) -> None:
    """One row a program, shape by shape; `write` gets the rows of each shape."""
    names = {f: [OURS, *(PEERS[f] if peers else [])] for f in forms}
    programs = [Program(f, n, shapes, configs) for f in forms for n in names[f]]
    for shape in shapes:
        begin, heard = time.time(), {}
        for p in programs:
            p.tell()
        for p in programs:
            word, heard[p] = p.hear(begin + seconds - time.time())
            if word == "ready":
                heard[p] = None
        for p in programs:
            if heard[p] is None:
                p.tell()
                heard[p] = p.hear(60)[1]
        write(rows(shape, heard))
    for p in programs:
        p.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", default=",".join(PEERS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--configs", type=int, default=0, help="a peer's kernel may try, 0: all it has")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for compiling everything, a shape")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        if a.configs:
            tune_few(a.configs)
        worker(a.one[0], a.one[1], a.one[2:])
        return
    import triton

    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    lines = [f"{date.today()}, {torch.cuda.get_device_name()}, {versions}", f"`{' '.join(sys.argv)}`", "",
             "| op | (B,T,H,D) | program | forward ms | with backward ms "
             "| of best peer: forward / with backward / memory | of floor | MiB | first call s | error |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip

    def write(more: list[str]) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)
        if a.out:
            a.out.write_text("\n".join(lines) + "\n")

    compare(a.forms.split(","), a.shapes.split(","), not a.no_peers, a.configs, a.seconds, write)


if __name__ == "__main__":
    main()
