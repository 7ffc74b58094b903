"""The demo in its short form: it trains, scores, writes, goes on in a new process, and names what it left."""

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def test_the_short_demo(tmp_path):
    old = tmp_path / "runs" / "demo" / "checkpoints" / "step-00000999"
    old.mkdir(parents=True)  # left by an earlier run, which is replaced
    run = subprocess.run(
        [sys.executable, DEMO, "--short"], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert not old.exists()
    assert "this model, the first 2,000 characters of Persuasion" in run.stdout
    assert all(f" {bits} " in run.stdout for bits in ("2.08", "2.23", "2.36"))
    assert "what one run without a break writes" in run.stdout  # the demo compares the two texts itself
    for name in ("loss.png", "log.jsonl", "tensorboard", "model", "page.state"):
        assert (tmp_path / "runs" / "demo" / name).exists() and name in run.stdout
