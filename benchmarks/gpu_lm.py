"""Language models on a GPU: a training step beside the libraries in use, and decoding after long prompts.

    python benchmarks/gpu_lm.py [--only gla,attention] [--seconds 2] [--no-peers] [--out FILE]
    python benchmarks/gpu_lm.py --configs 3 --waiting 110 --budget 560 --out FILE     all in 8 to 9 minutes

Models of 110 to 125 million weights: 12 layers of width 768, vocabulary 32,768, bfloat16, random weights and
tokens. A training step is forward, cross entropy, backward and fused AdamW over 65,536 tokens, as 16
sequences of 4,096 or 2 of 32,768; its time is the median of CUDA-event timings, its memory the peak with
weights and optimizer. Decoding takes the likeliest token of each sequence 2,048 times, by replayed CUDA
graphs, which attention's growing cache has recorded anew after every 1,024. Prompts are read before, in
pieces through the state; memory is the peak while decoding, with the weights.

Everything is first run with one layer (as few as a pattern has), all stacks at once in processes of their
own, for `--waiting` seconds at most, so that what is timed afterwards, in one process and one after another,
is compiled and tuned. `--configs N` lets the libraries' kernels choose among N launch configurations each
instead of all, which takes minutes. The table is written row by row; what `--budget` seconds do not reach is
named in it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import gpu_peers
import torch
from gpu_lm_models import DEPTH, OURS, PEERS, STACKS, VOCABULARY, WIDTH, made, ours
from torch import Tensor

from riverrun import ops
from riverrun import state as states
from riverrun.data.tokens import ByteTokenizer
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.graph import Replay, refusal
from riverrun.inference.sampling import Sampling
from riverrun.models.language import LanguageModel

TOKENS = 65_536  # of a training step
LENGTHS, PROMPTS, BATCHES, DECODE = (4096, 32_768), (1024, 65_536), (1, 16, 128), 2048
PIECE = 131_072  # tokens of all prompts together that are read at once
FEW = {"hybrid": 4, "rwkv7": 2}  # layers of the runs that compile; others take 1
ROOM = 110  # GiB that a cache may take


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside once the time is over."""

    def over(number: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Clock:
    """Seconds since the start, and until the budget is spent."""

    start, budget = time.perf_counter(), float("inf")

    @classmethod
    def left(cls) -> float:
        return cls.budget - (time.perf_counter() - cls.start)


def guarded(seconds: float, run: Callable, *args):
    """What `run` gives, or in a few words why it gives nothing; afterwards the device is empty."""
    if Clock.left() <= 0:
        return "not reached: time was over"
    try:
        with limited(min(seconds, Clock.left())):
            return run(*args)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except Exception as trouble:  # the other rows are still worth their time
        return f"{type(trouble).__name__}: {(str(trouble).splitlines() or [''])[0][:100]}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


class Training:
    """A model with its optimizer."""

    def __init__(self, stack: str, side: str, depth: int = DEPTH):
        self.model, self.loss = made(stack, side, depth)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, tokens: Tensor) -> Tensor:
        found = self.loss(tokens)
        found.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found.detach()

    def measured(self, T: int, seconds: float) -> tuple[float, float, float, float]:
        """(tokens a second, peak GiB, the first step's loss, millions of weights)."""
        tokens = torch.randint(VOCABULARY, (TOKENS // T, T + 1), device="cuda")
        first = float(self.step(tokens))
        self.step(tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or (len(times) < 20 and time.perf_counter() < end):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.step(tokens)
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        weights = sum(p.numel() for p in self.model.parameters()) / 1e6
        return TOKENS / median(times), torch.cuda.max_memory_allocated() / 2**30, first, weights


def training(stack: str, side: str, seconds: float, limit: float, depth: int = DEPTH) -> Iterator:
    """What each length gives, or why not; a library that is still tuning after `limit` is not asked again."""
    model = guarded(limit, Training, stack, side, depth)
    found = model
    for T in LENGTHS:
        if not isinstance(model, str) and not str(found).startswith("TimeoutError"):
            found = guarded(limit, model.measured, T, seconds)
        yield T, found
    del model
    gc.collect()
    torch.cuda.empty_cache()


def read(model: LanguageModel, batch: int, prompt: int):
    """The state after a prompt, read in pieces, and seconds."""
    start, state, piece = time.perf_counter(), None, max(1, min(prompt, PIECE // batch))
    for i in range(0, prompt, piece):
        tokens = torch.randint(VOCABULARY, (batch, min(piece, prompt - i)), device="cuda")
        state = model.hidden(tokens, state)[1]
    torch.cuda.synchronize()
    return state, time.perf_counter() - start


@torch.no_grad()
def decoding(model: LanguageModel, batch: int, prompt: int, seconds: float) -> tuple[float, ...]:
    """Tokens a second, ms a step, steps, peak GiB, MiB of a sequence's state, and prompt tokens a second."""
    state, reading = read(model, batch, prompt)
    held = states.nbytes(state) / batch

    def step(tokens: Tensor, state):
        logits, state = model(tokens, state)
        return logits[:, -1].argmax(-1, keepdim=True), state

    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    run = Replay(step, state, model) if refusal(model) is None else None
    if run is not None:
        state = None  # its memory is free: the replayed steps have a copy
        token = run(token)
    else:
        token, state = step(token, state)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, n = time.perf_counter(), 0
    while not n or (n < DECODE and time.perf_counter() - start < seconds):
        for _ in range(32):
            if run is not None:
                token = run(token)
            else:
                token, state = step(token, state)
        torch.cuda.synchronize()
        n += 32
    taken = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    return batch * n / taken, 1e3 * taken / n, n, peak, held / 2**20, batch * prompt / reading


def written(stack: str, graph: bool) -> float:
    """Tokens a second of `Generation`, one sequence drawn at top_p = 0.95: sampling and text included."""
    model = ours(stack, vocabulary=ByteTokenizer().size)
    speeds = []
    for _ in range(2):
        run = Generation(model, ByteTokenizer(), ["It is"], Limits(100, graph=graph), Sampling(top_p=0.95))
        start = time.perf_counter()
        for _ in run:
            pass
        speeds.append(run.sequences[0].draws / (time.perf_counter() - start))
    return max(speeds)


def prepare(stacks: list[str], peers: bool, configs: int, seconds: float) -> Iterator[str]:
    """Compile and tune for every stack, all at once; what each took."""
    start, jobs = time.perf_counter(), {}
    for stack in stacks:
        for side in (OURS, *(PEERS[stack] if peers else ())):
            command = [sys.executable, __file__, "--one", stack, side, "--configs", str(configs)]
            jobs[stack, side] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
    for (stack, side), job in jobs.items():
        try:
            out = job.communicate(timeout=max(1.0, seconds - (time.perf_counter() - start)))[0].strip()
        except subprocess.TimeoutExpired:
            job.kill()
            out = (job.communicate()[0] or "").strip() + f" stopped after {seconds:.0f} s"
        yield f"- {stack}, {side}: {(out.splitlines() or ['no output'])[-1][-200:]}"


def one(stack: str, side: str) -> None:
    """What `prepare` runs: each length of training and each batch of decoding, with few layers and short."""
    depth = FEW.get(stack, 1)
    for T, found in training(stack, side, 0.0, 400, depth):
        took = f"{time.perf_counter() - Clock.start:.0f} s"
        print(f"T = {T}: {found if isinstance(found, str) else took}", end="; ", flush=True)
    if side == OURS:
        model = ours(stack, depth)
        for batch in BATCHES:
            found = guarded(200, decoding, model, batch, 1024, 0.0)
            print(f"batch {batch}: {found if isinstance(found, str) else 'ready'}", end="; ", flush=True)


def train_rows(stacks: list[str], peers: bool, seconds: float) -> Iterator[str]:
    yield "| stack | T | side | tokens a second | of the best peer | peak GiB | first loss | weights, M |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for stack in stacks:
        sides = (OURS, *(PEERS[stack] if peers else ()))
        found = {side: dict(training(stack, side, seconds, 60 if side == OURS else 30)) for side in sides}
        for T in LENGTHS:
            speeds = [found[side][T][0] for side in sides if isinstance(found[side][T], tuple)]
            for side in sides:
                x, ratio = found[side][T], ""
                if isinstance(x, str):
                    yield f"| {stack} | {T:,} | {side} | {x} | | | | |"
                    continue
                if side == OURS and len(speeds) > 1:
                    ratio = f"{speeds[0] / max(speeds[1:]):.2f}"
                numbers = f"{x[0]:,.0f} | {ratio} | {x[1]:.1f} | {x[2]:.3f} | {x[3]:.0f}"
                yield f"| {stack} | {T:,} | {side} | {numbers} |"


def cache_gib(stack: str, tokens: int) -> float:
    """What attention's caches take, twice: they double when they are full, and are copied to have room."""
    layers = STACKS[stack].count("attention") * (DEPTH if stack == "attention" else DEPTH // 4)
    return 2 * layers * tokens * 2 * WIDTH * 2 / 2**30


def decode_rows(stacks: list[str], quick: bool, seconds: float) -> Iterator[str]:
    heads = ("stack", "batch", "prompt", "tokens a second", "ms a step", "steps", "peak GiB",
             "state MiB a sequence", "prompt tokens a second")  # fmt: skip
    yield f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}"
    for stack in stacks:
        model = guarded(30, ours, stack)
        whole = not isinstance(model, str) and not quick and refusal(model) is None
        for batch in BATCHES:
            for prompt in PROMPTS:
                if quick and batch * prompt > 2**21:
                    continue
                need = cache_gib(stack, batch * prompt)
                if isinstance(model, str):
                    found = model
                elif need > ROOM:
                    found = f"does not fit: its cache would take {need:,.0f} GiB while it grows"
                else:
                    found = guarded(90, decoding, model, batch, prompt, 60.0 if whole else seconds)
                head = f"| {stack} | {batch} | {prompt:,} |"
                if isinstance(found, str):
                    yield f"{head} {found} | | | | | |"
                else:
                    speed, ms, n, gib, state, reading = found
                    size = f"{gib:.2f} | {state:.2f}"
                    yield f"{head} {speed:,.0f} | {ms:.2f} | {n:,} | {size} | {reading:,.0f} |"


def report(stacks: list[str], peers: bool, quick: bool, seconds: float, configs: int) -> Iterator[str]:
    import triton

    yield "# Language models on a GPU\n"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    yield f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, one {torch.cuda.get_device_name()}, {versions}\n"
    yield f"    python {' '.join(sys.argv)}\n"
    if configs:
        yield f"The libraries' kernels chose among {configs} launch configurations each.\n"
    x = torch.zeros(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    yield f"    {ops.explain('outer', x, x, x)}"
    yield f"\n## A training step of {TOKENS:,} tokens\n"
    yield from train_rows(stacks, peers, seconds)
    yield "\n## Decoding\n"
    yield from decode_rows(stacks, quick, seconds)
    yield "\nGeneration of one text with sampling, tokens a second, replayed / step by step:\n"
    for stack in stacks:
        pair = [guarded(30, written, stack, graph) for graph in (True, False)]
        yield f"- {stack}: {' / '.join(f'{x:,.0f}' if isinstance(x, float) else x for x in pair)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STACKS))
    parser.add_argument("--quick", action="store_true", help="a second a row, and no 128 prompts of 65,536")
    parser.add_argument("--seconds", type=float, help="for one row; 2, quick 1")
    parser.add_argument("--waiting", type=float, default=400, help="seconds for compiling; 0: it was done")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all of it")
    parser.add_argument("--configs", type=int, default=0, help="of a library's kernel to choose from; 0: all")
    parser.add_argument("--compile", action="store_true", help="nothing else")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    Clock.budget = given.budget
    if given.configs:
        gpu_peers.tune_few(given.configs)
    if given.one:
        return one(*given.one)
    seconds = given.seconds or (1.0 if given.quick else 2.0)
    lines, stacks, peers = [], given.only.split(","), not given.no_peers
    for line in prepare(stacks, peers, given.configs, given.waiting) if given.waiting else ():
        print(line, flush=True)
    rows = report(stacks, peers, given.quick, seconds, given.configs) if not given.compile else ()
    for line in rows:
        print(line, flush=True)
        lines.append(line)
        if given.out:
            given.out.write_text("\n".join(lines) + "\n")
    print(f"\n{time.perf_counter() - Clock.start:.0f} s in all")


if __name__ == "__main__":
    main()
