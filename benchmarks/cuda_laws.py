"""What tests/test_cuda.py finds on this GPU, as a table: one row a mixer.

    python benchmarks/cuda_laws.py [--workers 15] [--seconds 600] [--out benchmarks/results/cuda_laws.md]

Needs pytest and pytest-xdist. The columns count what passed; what failed stands below the table with its
first line, and a law that its row says does not hold is counted as expected.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import torch

COLUMNS = {
    "test_law": "laws, float64",
    "test_law_in_float32": "laws, float32",
    "test_cpu_and_gpu_agree": "as on a CPU",
    "test_replayed_steps_are_the_steps": "replayed",
}


def run(workers: int, seconds: float, path: str) -> float:
    """Run the tests, write what they found as JUnit XML to `path`; seconds. Late tests are left out."""
    tests = Path(__file__).parents[1] / "tests" / "test_cuda.py"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(workers), "--dist", "worksteal", f"--junitxml={path}", "-o", "junit_family=xunit1"]
    start = time.perf_counter()
    tests_run = subprocess.Popen(command, stdout=sys.stderr)
    try:
        tests_run.wait(seconds)
    except subprocess.TimeoutExpired:
        tests_run.send_signal(signal.SIGINT)  # it writes what it has
        tests_run.wait(30)
    return time.perf_counter() - start


def outcome(case: xml.Element) -> str:
    """ "passed", "expected" (a law the row says is broken) or the first line of what went wrong."""
    for kind in ("failure", "error"):
        if (found := case.find(kind)) is not None:
            return (found.get("message") or kind).splitlines()[0]
    return "passed" if case.find("skipped") is None else "expected"


def table(path: str) -> list[str]:
    counts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    errors, others, wrong = {}, [], []
    for case in xml.parse(path).getroot().iter("testcase"):
        name, _, given = case.get("name", "").rstrip("]").partition("[")
        if not name:  # what ran when time was over
            continue
        found = outcome(case)
        if name in COLUMNS:
            mixer = given.split("-")[0]
            counts[mixer][name].append(found)
            for property in case.iter("property"):
                errors[mixer] = property.get("value")
        else:
            others.append(f"- {name}{f' [{given}]' if given else ''}: {found}")
        if found not in ("passed", "expected"):
            wrong.append(f"- {name} [{given}]: {found}")
    lines = [
        f"| mixer | {' | '.join(COLUMNS.values())} | largest error, float32 |",
        "|---|---|---|---|---|---|",
    ]
    for mixer in sorted(counts):
        cells = [cell(counts[mixer][name]) for name in COLUMNS]
        lines.append(f"| {mixer} | {' | '.join(cells)} | {errors.get(mixer, '')} |")
    return [*lines, "", "Beside the mixers:", "", *others, "", "Failed:", "", *(wrong or ["nothing"])]


def cell(found: list[str]) -> str:
    """ "15 of 16, 1 expected"; empty where nothing concerned the mixer."""
    if not found:
        return ""
    expected = found.count("expected")
    return f"{found.count('passed')} of {len(found) - expected}" + (
        f", {expected} expected" if expected else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=600, help="after which the rest is left out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found.xml")
        seconds = run(given.workers, given.seconds, path)
        lines = table(path)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}"
    head = [
        "# Every mixer under every law on a GPU\n",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, one {torch.cuda.get_device_name()}, {versions}.",
        f"{seconds:.0f} s with {given.workers} processes.\n",
        f"    python {' '.join(sys.argv)}\n",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
