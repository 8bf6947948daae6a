"""A training in this process, from a tiny run: what the tests of the training loop share."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.tiny_run import tiny_run
from trainer import prepare
from trainer.runs import Run, read_jsonl
from trainer.training import loop

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""The environment of training processes in tests; see conftest.py."""


def prepared(run: Run) -> tuple[dict[str, Any], Path]:
    """What the child would be told, and its work folder with the rows in place."""
    work = run.stage("train") / "work"
    work.mkdir()
    return prepare.prepare(run, {}).spec, work


def trained(
    root: Path, settings: str, *, before_pass: Callable[[int], None] = lambda _: None, **options: Any
) -> tuple[dict[str, Any], Path]:
    """Train a tiny run to the end. Returns the result and the work folder.

    Args:
        settings: keys of student.train.
        options: of `tiny_run`.
    """
    spec, work = prepared(tiny_run(root, train=settings, **options))
    return loop.train(spec, work, before_pass), work


def curve(work: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of metrics.jsonl, evaluations included."""
    rows = read_jsonl(work.parent / "metrics.jsonl")
    return [(row["step"], row["loss"] if "loss" in row else row["eval_loss"]) for row in rows]


def wait_until(
    reached: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 120
) -> None:
    """Poll; fail after so long, or when the process has ended."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.005)


def running(argument: Path) -> list[int]:
    """Processes that were given this argument and are alive."""
    found = psutil.process_iter(["cmdline", "status"])
    return [
        each.pid
        for each in found
        if str(argument) in (each.info["cmdline"] or []) and each.info["status"] != psutil.STATUS_ZOMBIE
    ]
