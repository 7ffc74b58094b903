"""riverrun beside HuggingFace transformers' PyTorch path on a CPU: same models, same weights, one run.

    python benchmarks/cpu_models.py                             writes benchmarks/results/cpu_models.md
    python benchmarks/cpu_models.py --only mamba --threads 1    prints these rows, writes nothing

Whole language models of width 256, 4 layers, vocabulary 1,000, batch 1, float32, on one thread and on all.
transformers' weights are copied into riverrun's model; logits must agree before anything is timed.

    mamba         MambaForCausalLM, no feed-forward layers on either side
    mamba2        Mamba2ForCausalLM, the same
    qwen3_next    Qwen3NextForCausalLM with gated delta layers only, no attention, dense feed-forward layers

A training step is forward, cross-entropy, backward and fused AdamW. Prefill reads 2,048 tokens into a state.
Decoding feeds the most likely token back, one at a time; one more row has riverrun's step compiled, as
`riverrun generate compile=true` does, which takes some ten seconds before the first token. Steps of small
models are faster on one thread, which `riverrun generate` sees to: riverrun decodes on as many threads as
that would, transformers on one or all, whichever is faster. Each number is the best of many repetitions in
a process of its own, both sides in turns, and its memory is the growth of that process's peak resident
memory over what the model and a first short run take.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from cpu_peers import LAYERS, PAIRS, VOCABULARY, WIDTH, make
from timing import Found, alone, in_turns, provenance
from torch import Tensor

from riverrun.inference.compiled import Compiled
from riverrun.inference.decoding import step_threads

LENGTHS, PREFILL, DECODE = (128, 512, 2048), 2048, 20  # tokens
PATIENCE = 60  # seconds; a training step that would take longer is estimated, not run
SECONDS = 2.0  # at least this long is each thing repeated, if it takes less
# Both sum in float32, in different orders: errors of some 1e-7 a sum grow through 4 layers and 200 steps to
# about 1e-5 of the largest logit. A wrong weight or constant is off by 1e-2 or more.
TOLERANCE = 1e-4
RESULTS = Path(__file__).parent / "results" / "cpu_models.md"


def agree(name: str) -> float:
    """max |difference| of logits over max |logit|: 200 tokens at once, then 8 one at a time."""
    tokens, logits = torch.randint(VOCABULARY, (1, 208)), []
    with torch.no_grad():
        for model, call in (make(name, "riverrun"), make(name, "transformers")):
            y, state = call(model.eval(), tokens[:, :200], None)
            ys = [y]
            for t in range(200, 208):
                y, state = call(model, tokens[:, t : t + 1], state)
                ys.append(y)
            logits.append(torch.cat(ys, 1))
    ours, theirs = logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


def training(name: str, side: str, T: int) -> Callable[[], object]:
    model, call = make(name, side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor) -> None:
        logits, _ = call(model, tokens[:, :-1], None)
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(torch.randint(VOCABULARY, (1, 17)))
    return partial(step, torch.randint(VOCABULARY, (1, T + 1)))


def prefill(name: str, side: str) -> Callable[[], object]:
    model, call = make(name, side)
    run = torch.no_grad()(partial(call, model.eval()))
    run(torch.randint(VOCABULARY, (1, 16)), None)
    return partial(run, torch.randint(VOCABULARY, (1, PREFILL)), None)


def decode(name: str, side: str, compiled: bool = False) -> Callable[[], object]:
    """`DECODE` steps, on as many threads as `riverrun generate` would have for riverrun's model."""
    model, call = make(name, side)
    if side == "riverrun":
        torch.set_num_threads(step_threads(model, 1))
    with torch.no_grad():
        logits, state = call(model.eval(), torch.randint(VOCABULARY, (1, 64)), None)
    running = Compiled(model)(state) if compiled else None

    @torch.no_grad()
    def run() -> None:
        nonlocal logits, state
        for _ in range(DECODE):
            tokens = logits[:, -1:].argmax(-1)
            if running is None:
                logits, state = call(model, tokens, state)
            else:
                logits = running(tokens)

    run()
    return run


def rows(name: str, threads: int) -> Iterator[str]:
    """The table's rows of one model."""
    theirs: dict[int, float] = {}
    sides = "riverrun", "transformers"
    for T in LENGTHS:
        expected = (
            theirs[T // 4] ** 2 / theirs[T // 16] if T // 16 in theirs else 0.0
        )  # a power law through the last two
        wanted = sides[:1] if expected > PATIENCE else sides
        found = in_turns(*((threads, training, name, side, T) for side in wanted), seconds=SECONDS)
        theirs[T] = found[1].seconds if found[1:] else expected
        yield row(f"{name} | training, T = {T:,}", T, *found, expected=expected)
    found = in_turns(*((threads, prefill, name, side) for side in sides), seconds=SECONDS)
    yield row(f"{name} | prefill, T = {PREFILL:,}", PREFILL, *found)
    eager, compiled, *others = in_turns(
        (threads, decode, name, "riverrun"),
        (threads, decode, name, "riverrun", True),
        *((n, decode, name, "transformers") for n in sorted({1, threads})),
        seconds=SECONDS,
    )
    other = min(others, key=lambda found: found.seconds)
    yield row(f"{name} | decoding", DECODE, eager, other)
    yield row(f"{name} | decoding, riverrun compiled", DECODE, compiled, other)


def row(label: str, tokens: int, ours: Found, theirs: Found | None = None, expected: float = 0.0) -> str:
    speed = tokens / ours.seconds
    if theirs is None:
        return (
            f"| {label} | {speed:,.0f} | not run: a step would take about {expected:.0f} s "
            f"| about {expected / ours.seconds:,.0f} | {ours.mebibytes:,.0f} | |"
        )
    ratio, memory = theirs.seconds / ours.seconds, f"{ours.mebibytes:,.0f} | {theirs.mebibytes:,.0f}"
    return f"| {label} | {speed:,.0f} | {tokens / theirs.seconds:,.0f} | {ratio:.1f} | {memory} |"


def report(names: list[str], threads: list[int]) -> Iterator[str]:
    yield "# Language models on a CPU, beside transformers\n"
    yield f"{provenance()}\n\ntransformers {transformers.__version__}.\n"
    yield (
        f"Width {WIDTH}, {LAYERS} layers, vocabulary {VOCABULARY:,}, batch 1, float32; transformers' PyTorch "
        "path; the same weights on both sides, timed in turns. Speeds are in tokens per second. MiB is the "
        "growth of the process's peak memory over what the model and a first short run take. Decoding: "
        "riverrun on as many threads as `riverrun generate` takes for a step (one, for models as small as "
        "these), transformers on one thread or all, whichever is faster.\n"
    )
    for name in names:
        found = alone(1, agree, name)
        if found > TOLERANCE:
            raise SystemExit(
                f"{name}: logits differ by {found:.1e} of the largest, allowed is {TOLERANCE:.0e}"
            )
        yield f"- {name}: logits differ by {found:.1e} of the largest (allowed: {TOLERANCE:.0e})"
    for n in threads:
        yield f"\n## {n} thread{'s' if n > 1 else ''}\n"
        yield "| model | measured | riverrun | transformers | ratio | riverrun MiB | transformers MiB |"
        yield "|---|---|---:|---:|---:|---:|---:|"
        for name in names:
            yield from rows(name, n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(PAIRS))
    parser.add_argument("--threads", type=int, nargs="*", help="one and all, unless given")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    names, threads, lines = [given.only] if given.only else list(PAIRS), given.threads, []
    for line in report(names, threads or sorted({1, os.cpu_count() or 1})):
        print(line, flush=True)
        lines.append(line)
    if not given.only and not threads:
        RESULTS.write_text("\n".join(lines) + "\n")
        print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
