"""Language models on a GPU: a training step beside the libraries in use, and decoding after long prompts.

    python benchmarks/gpu_lm.py [--quick] [--only gla,attention] [--seconds 4] [--no-peers] [--out FILE]

Models of 110 to 125 million weights: 12 layers of width 768, vocabulary 32,768, bfloat16, random weights and
tokens. A training step is forward, cross entropy, backward and fused AdamW over 65,536 tokens, as 16
sequences of 4,096 or 2 of 32,768; its time is the median of CUDA-event timings, its memory the peak with
weights and optimizer. Decoding takes the likeliest token of each sequence 2,048 times, or for `--seconds` if
that is shorter: stacks with a constant state by replayed CUDA graphs, attention's growing cache step by step.
Prompts are read before, in pieces through the state; memory is the peak while decoding, with the weights.

Everything is first run with one layer (as few as a pattern has), all stacks at once in processes of their
own, so that what is timed afterwards, in one process and one after another, is compiled and tuned.
"""

from __future__ import annotations

import argparse
import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from gpu_lm_models import DEPTH, PEERS, STACKS, VOCABULARY, WIDTH, made, ours
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


def guarded(seconds: float, run: Callable, *args):
    """What `run` gives, or in a few words why it gives nothing; afterwards the device is empty."""
    try:
        with limited(seconds):
            return run(*args)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except Exception as trouble:  # the other rows are still worth their time
        return f"{type(trouble).__name__}: {(str(trouble).splitlines() or [''])[0][:100]}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def training(stack: str, side: str, T: int, seconds: float, depth: int = DEPTH) -> tuple[float, float, float]:
    """(tokens a second, peak GiB, loss) of a training step."""
    model, loss = made(stack, side, depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCABULARY, (TOKENS // T, T + 1), device="cuda")

    def step() -> Tensor:
        found = loss(tokens)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    first = float(step())
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() < end):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return TOKENS / median(times), torch.cuda.max_memory_allocated() / 2**30, first


def read(model: LanguageModel, batch: int, prompt: int):
    """The state after a prompt, read in pieces, and seconds."""
    start, state, piece = time.perf_counter(), None, max(1, min(prompt, PIECE // batch))
    for i in range(0, prompt, piece):
        tokens = torch.randint(VOCABULARY, (batch, min(piece, prompt - i)), device="cuda")
        state = model.hidden(tokens, state)[1]
    torch.cuda.synchronize()
    return state, time.perf_counter() - start


@torch.no_grad()
def decoding(stack: str, batch: int, prompt: int, seconds: float, depth: int = DEPTH) -> tuple[float, ...]:
    """Tokens a second, ms a step, steps, peak GiB, MiB of a sequence's state, and prompt tokens a second."""
    model = ours(stack, depth)
    state, reading = read(model, batch, prompt)
    held = states.nbytes(state) / batch

    def step(tokens: Tensor, state):
        logits, state = model(tokens, state)
        return logits[:, -1].argmax(-1, keepdim=True), state

    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    run = Replay(step, state) if refusal(model) is None else None
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


def prepare(stacks: list[str], peers: bool, seconds: float) -> Iterator[str]:
    """Compile and tune for every stack, all at once; what each took."""
    start, jobs = time.perf_counter(), {}
    for stack in stacks:
        for side in ("ours", *(["peer"] if peers and stack in PEERS else [])):
            command = [sys.executable, __file__, "--one", stack, side]
            jobs[stack, side] = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    for (stack, side), job in jobs.items():
        try:
            out = job.communicate(timeout=max(1.0, seconds - (time.perf_counter() - start)))[0].strip()
        except subprocess.TimeoutExpired:
            job.kill()
            out = f"stopped after {seconds:.0f} s"
        yield f"- {stack}, {side}: {(out.splitlines() or ['no output'])[-1][:200]}"


def one(stack: str, side: str) -> None:
    """What `prepare` runs: each length of training and each batch of decoding, with few layers and short."""
    start, depth = time.perf_counter(), FEW.get(stack, 1)
    for T in LENGTHS:
        found = guarded(400, training, stack, side, T, 0.0, depth)
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"T = {T}: {found if isinstance(found, str) else took}", end="; ", flush=True)
    if side == "ours":
        for batch in BATCHES:
            found = guarded(200, decoding, stack, batch, 1024, 0.0, depth)
            print(f"batch {batch}: {found if isinstance(found, str) else 'ready'}", end="; ", flush=True)


def train_rows(stacks: list[str], peers: bool, seconds: float) -> Iterator[str]:
    yield "| stack | T | side | tokens a second | of the peer | peak GiB | first loss |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    for stack in stacks:
        for T in LENGTHS:
            found = guarded(60, training, stack, "ours", T, seconds)
            other = guarded(40, training, stack, "peer", T, seconds) if peers and stack in PEERS else None
            both = isinstance(found, tuple) and isinstance(other, tuple)
            ratio = f"{found[0] / other[0]:.2f}" if both else ""
            for side, x in (("riverrun", found), (PEERS.get(stack, ("",))[0], other)):
                if isinstance(x, tuple):
                    of = ratio if side == "riverrun" else ""
                    yield f"| {stack} | {T:,} | {side} | {x[0]:,.0f} | {of} | {x[1]:.1f} | {x[2]:.3f} |"
                elif x is not None:
                    yield f"| {stack} | {T:,} | {side} | {x} | | | |"


def cache_gib(stack: str, tokens: int) -> float:
    """What attention's caches take, twice: they double when they are full."""
    layers = STACKS[stack].count("attention") * (DEPTH if stack == "attention" else DEPTH // 4)
    return 2 * layers * tokens * 2 * WIDTH * 2 / 2**30


def decode_rows(stacks: list[str], quick: bool, seconds: float) -> Iterator[str]:
    heads = ("stack", "batch", "prompt", "tokens a second", "ms a step", "steps", "peak GiB",
             "state MiB a sequence", "prompt tokens a second")  # fmt: skip
    yield f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}"
    for stack in stacks:
        for batch in BATCHES:
            for prompt in PROMPTS:
                if quick and batch * prompt > 2**21:
                    continue
                need = cache_gib(stack, batch * prompt)
                if need > 100:
                    found = f"not run: its cache would take {need:,.0f} GiB while it grows"
                else:
                    found = guarded(40, decoding, stack, batch, prompt, seconds)
                head = f"| {stack} | {batch} | {prompt:,} |"
                if isinstance(found, str):
                    yield f"{head} {found} | | | | | |"
                else:
                    speed, ms, n, gib, state, reading = found
                    size = f"{gib:.2f} | {state:.2f}"
                    yield f"{head} {speed:,.0f} | {ms:.2f} | {n:,} | {size} | {reading:,.0f} |"


def report(stacks: list[str], peers: bool, quick: bool, seconds: float) -> Iterator[str]:
    import triton

    weights = {s: sum(p.numel() for p in ours(s).parameters()) / 1e6 for s in stacks}
    yield "# Language models on a GPU\n"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    yield f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, one {torch.cuda.get_device_name()}, {versions}\n"
    yield f"    python {' '.join(sys.argv)}\n"
    yield f"Weights, millions: {', '.join(f'{s} {n:.0f}' for s, n in weights.items())}."
    x = torch.zeros(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    yield f"\n    {ops.explain('outer', x, x, x)}"
    yield f"\n## A training step of {TOKENS:,} tokens\n"
    yield from train_rows(stacks, peers, seconds)
    yield "\n## Decoding\n"
    yield from decode_rows(stacks, quick, seconds)
    yield "\nGeneration of one text with sampling, tokens a second, replayed / step by step:\n"
    for stack in (s for s in stacks if s not in ("attention", "hybrid")):
        pair = [guarded(30, written, stack, graph) for graph in (True, False)]
        yield f"- {stack}: {' / '.join(f'{x:,.0f}' if isinstance(x, float) else x for x in pair)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(STACKS))
    parser.add_argument("--quick", action="store_true", help="a second a row, and no 128 prompts of 65,536")
    parser.add_argument("--seconds", type=float, help="for one row; 4, quick 1")
    parser.add_argument("--waiting", type=float, default=400, help="seconds for compiling; 0: it was done")
    parser.add_argument("--compile", action="store_true", help="nothing else")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return one(*given.one)
    seconds = given.seconds or (1.0 if given.quick else 4.0)
    lines, stacks, peers = [], given.only.split(","), not given.no_peers
    for line in prepare(stacks, peers, given.waiting) if given.waiting else ():
        print(line, flush=True)
    for line in report(stacks, peers, given.quick, seconds) if not given.compile else ():
        print(line, flush=True)
        lines.append(line)
        if given.out:
            given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
