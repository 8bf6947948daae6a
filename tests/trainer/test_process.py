"""The wrapper for external programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainer.process import run


def test_output_and_code_are_kept(tmp_path: Path) -> None:
    code = "import sys, os; print('out'); print(os.getcwd(), file=sys.stderr); sys.exit(3)"
    done = run([sys.executable, "-c", code], timeout=30, folder=tmp_path)
    assert done.code == 3
    assert done.output.startswith("out") or "out" in done.output
    assert str(tmp_path) in done.output


def test_the_environment_is_the_one_given() -> None:
    done = run(
        [sys.executable, "-c", "import os; print(sorted(os.environ))"], timeout=30, environment={"ONLY": "1"}
    )
    assert "ONLY" in done.output
    assert "HOME" not in done.output


def test_a_timeout_kills_and_says_so() -> None:
    done = run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], timeout=2)
    assert done.code == 124
    assert done.last_line == "timed out after 2 s"
    assert "begun" in done.output


def test_a_child_notices_its_parents_death() -> None:
    code = (
        "import os, threading; from trainer.process import on_parent_death\n"
        "gone = threading.Event(); on_parent_death(gone.set); print('up', flush=True)\n"
        "assert gone.wait(30); print('noticed', flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.stdin.close()
    assert child.stdout.readline() == "noticed\n"
    assert child.wait(timeout=30) == 0
    child.stdout.close()
