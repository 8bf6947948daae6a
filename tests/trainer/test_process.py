"""The wrapper for external programs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from trainer import child
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
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdin.close()
    assert process.stdout.readline() == "noticed\n"
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_a_child_that_is_stopped_from_another_thread_ends_as_if_its_parent_were_gone(tmp_path: Path) -> None:
    code = (
        "import os, time; from trainer.process import on_parent_death\n"
        'on_parent_death(lambda: os._exit(7)); print(\'{"event": "up"}\', flush=True); time.sleep(60)'
    )
    stop = threading.Event()
    ended = child.run(
        [sys.executable, "-c", code],
        folder=tmp_path,
        log=tmp_path / "log",
        environment=os.environ,
        report=lambda _: stop.set(),
        stop=stop,
    )
    assert ended == 7
