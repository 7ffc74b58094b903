"""The demo in its short form: trains, scores, writes, goes on in a new process, and says where everything lies."""

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


def test_the_demo_runs_twice_in_the_same_place(tmp_path):
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, DEMO, "--short"],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=600,
        )
        assert run.returncode == 0, run.stderr
    shown = run.stdout
    assert "this model, the first 2,000 characters of Persuasion" in shown
    assert " 2.08 " in shown and " 2.23 " in shown and " 2.36 " in shown
    assert "what one run without a break writes" in shown  # the demo compares the two texts itself
    for name in ("loss.png", "log.jsonl", "tensorboard", "model", "page.state"):
        assert (tmp_path / "runs" / "demo" / name).exists() and name in shown
