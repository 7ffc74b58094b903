"""Ops on a GPU against the libraries in use: time, memory, first call, floor and error, one table.

    python benchmarks/gpu_ops.py [--forms outer-head,delta] [--shapes 4x4096x16x128] [--no-peers] [--out FILE]

Matrix memories (B, T, H, D), with causal attention beside them, scans (B, T, D) and LSTMs (B, T, width) with
their input projection. Every (form, program) is a process. For each shape ours compile one after the other,
so that each first call has the machine to itself; then all peers compile and tune themselves at the same
time; then each is told to time itself while all others wait. Who is not ready after `--seconds` is left out.
Times are medians of CUDA-event timings with a cold L2; memory is the peak above the inputs during a forward
and its backward. Floors: `gpu_forms.py`. Errors are relative norms against the definition, folded in float64
over a short sequence of the same widths.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_forms import FORMS
from gpu_peers import PEERS, tune_few

OURS = "riverrun"


def numbers(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")]


def program(form: str, name: str, args: tuple):
    """(call, the inputs whose gradients are asked for)."""
    if name == OURS:
        return lambda: FORMS[form].ours(*args), [x for x in args if x is not None]
    call = PEERS[form][name](*args)
    return call, [x for x in getattr(call, "inputs", args) if x is not None]


def both(call, wanted, dy):
    return torch.autograd.grad(call(), wanted, dy)


def prepare(form: str, shape: str, name: str):
    """(call, wanted inputs, gradient of y, seconds of the first forward + backward)."""
    torch.manual_seed(0)
    args = FORMS[form].inputs(*numbers(shape))
    call, wanted = program(form, name, args)
    torch.cuda.synchronize()
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


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float64))


@cache
def error(form: str, small: tuple[int, ...]) -> float:
    """The largest relative error of ours over y and all gradients."""
    torch.manual_seed(0)
    args = FORMS[form].inputs(*small)
    exact = tuple(None if x is None else wide(x).requires_grad_() for x in args)
    y, y64 = FORMS[form].ours(*args), FORMS[form].exact(*exact)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x for x in args if x is not None], dy)
    true = torch.autograd.grad(y64, [x for x in exact if x is not None], wide(dy))
    return max(float((wide(a) - b).norm() / b.norm()) for a, b in zip((y, *found), (y64, *true), strict=True))


def say(word: str, value) -> None:
    print(json.dumps([word, value]), flush=True)


def worker(form: str, name: str, shapes: list[str]) -> None:
    """One program. For each shape it is told to go on three times: to make its first call, to look at its
    error, to time itself; each time it says that it has."""
    say("up", None)
    for shape in shapes:
        sys.stdin.readline()
        try:
            call, wanted, dy, first = prepare(form, shape, name)
            say("ready", None)
            sys.stdin.readline()
            wrong = error(form, FORMS[form].small(*numbers(shape))) if name == OURS else None
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
        self.form, self.name, self.shapes = form, name, shapes
        command = [sys.executable, __file__, "--configs", str(configs), "--one", form, name, *shapes]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        self.said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith('["'):  # libraries print too
                self.said.put(line)
        self.said.put(None)

    def hear(self, seconds: float):
        """(word, value), or why there is none."""
        try:
            line = self.said.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.stop()
            return "failed", "not ready in time"
        if line is None:
            self.said.put(None)
            return "failed", "stopped at an earlier shape"
        return json.loads(line)

    def stop(self) -> None:
        """It and the compilers it has started, which would disturb the others' times."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

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
            if None not in best:
                found = (r["forward"], r["both"], r["MiB"])
                ratio = " / ".join(f"{x / b:.2f}" for x, b in zip(found, best, strict=True))
        low = FORMS[program.form].floor(*numbers(shape))
        wrong = "" if r["error"] is None else f"{r['error']:.1e}"
        lines.append(
            f"{head} | {r['forward']:.3f} | {r['both']:.3f} | {ratio} | {r['forward'] / low[0]:.1f} / "
            f"{r['both'] / low[1]:.1f} | {r['MiB']:.0f} | {r['first']:.1f} | {wrong} |"
        )
    return lines


def compare(forms, shapes, peers: bool, configs: int, seconds: float, write) -> None:
    """One row a program, shape by shape; `write` gets the rows of each shape."""
    programs: dict[tuple[str, str], Program] = {}
    for shape in shapes:
        for form in forms:
            own = [x for x in shapes if x in FORMS[form].shapes]
            for name in (*[OURS] * bool(FORMS[form].ours), *(PEERS[form] if peers else ())):
                if own[:1] == [shape]:
                    programs[form, name] = Program(form, name, own, configs)
        some = [p for p in programs.values() if shape in p.shapes]
        for p in some:
            if p.shapes[0] == shape:
                p.hear(60)  # that it is up
        heard = together(some, seconds)
        write(rows(shape, heard))
        for p in some:
            if p.shapes[-1] == shape:
                p.stop()


def together(programs: list[Program], seconds: float) -> dict[Program, dict | str]:
    """What programs measure at their next shape, or why they do not."""
    failed: dict[Program, str] = {}

    def go_on(some: list[Program], until: float) -> None:
        """All at the same time."""
        some = [p for p in some if p not in failed]
        for p in some:
            p.tell()
        for p in some:
            word, value = p.hear(until - time.time())
            if word != "ready":
                failed[p] = value

    ours, others = ([p for p in programs if (p.name == OURS) == mine] for mine in (True, False))
    for p in ours:
        go_on([p], time.time() + seconds)
    go_on(programs, time.time() + seconds)  # errors of ours, first calls of the others
    go_on(others, time.time() + seconds)
    found: dict[Program, dict | str] = {}
    for p in programs:
        if p not in failed:
            p.tell()
        found[p] = failed[p] if p in failed else p.hear(60)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = dict.fromkeys(shape for form in FORMS.values() for shape in form.shapes)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--shapes", default=",".join(every))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--configs", type=int, default=0, help="a peer's kernel may try, 0: all it has")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="for compiling everything, a shape")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    a = parser.parse_args()
    for given, known in ((a.forms, FORMS), (a.shapes, every)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if a.one:
        if a.configs:
            tune_few(a.configs)
        worker(a.one[0], a.one[1], a.one[2:])
        return
    import triton

    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    lines = [f"{when}, one {torch.cuda.get_device_name()}, {versions}", f"`python {' '.join(sys.argv)}`", "",
             "| op | shape | program | forward ms | with backward ms "
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
