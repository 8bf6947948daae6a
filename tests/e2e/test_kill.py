"""kill -9 in every stage: the same command goes on, ends in the same release, and pays for nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import release as releases
from trainer.pipeline import ORDER

ROOT = Path(__file__).parents[2]
TICKETS = ROOT / "examples" / "tickets"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SIZES = {"train": 120, "calibrate": 60, "test": 40}
PROGRESS = {"capture": 40, "evaluate": 30}
"""Rows that the stage has stored when it is killed; the other stages are killed as soon as they have begun."""


@dataclass
class Bench:
    """A small tickets task, a stand-in teacher that counts, and runs of it as child processes."""

    task: Path
    address: str

    def environment(self, home: Path) -> dict[str, str]:
        return {
            **os.environ,
            "HOMESTILL_HOME": str(home),
            "HOMESTILL_LOCAL": "embedded",
            "HOMESTILL_TEACHER_API_BASE": f"{self.address}/v1",
        }

    def start(self, home: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trainer", "run", str(self.task), "--force"]
        with (home.parent / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=self.environment(home), cwd=ROOT, stdout=log, stderr=log)

    def counts(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/counts", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    task = tmp_path / "task"
    shutil.copytree(TICKETS, task, ignore=shutil.ignore_patterns("data", "__pycache__"))
    (task / "data").mkdir()
    for split, size in SIZES.items():
        lines = (TICKETS / "data" / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (task / "data" / f"{split}.jsonl").write_text("".join(lines[:size]), "utf-8")
    settings = yaml.safe_load((task / "task.yaml").read_text("utf-8"))
    settings["student"]["train"].update(epochs=1, eval_steps=4)
    (task / "task.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    port = tmp_path / "port"
    answers = sorted((TICKETS / "data").glob("*.jsonl"))
    command: list[str | Path] = [sys.executable, ROOT / "examples" / "standin_teacher.py"]
    teacher = subprocess.Popen(
        [
            *command,
            "--port",
            "0",
            "--port-file",
            port,
            "--inputs",
            "text",
            "--latency-ms",
            "20",
            "--answers",
            *answers,
        ]
    )
    try:
        _wait(port.is_file, teacher, 60)
        yield Bench(task, f"http://127.0.0.1:{port.read_text('utf-8').strip()}")
    finally:
        teacher.terminate()
        teacher.wait()


def test_kill_9_in_every_stage(bench: Bench, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole" / "home", tmp_path / "broken" / "home"
    whole.parent.mkdir()
    broken.parent.mkdir()
    assert bench.start(whole).wait(timeout=900) == 0, (whole.parent / "log.txt").read_text()
    once = bench.counts()
    for stage in ORDER:
        _kill_in(stage, bench, broken)
    assert bench.start(broken).wait(timeout=900) == 0, (broken.parent / "log.txt").read_text()
    assert _content(broken) == _content(whole)
    assert once["max_per_prompt"] == 1
    twice = bench.counts()  # the second home asks everything once more, and nothing a third time
    assert (twice["max_per_prompt"], twice["requests"]) == (2, 2 * once["requests"])


def _kill_in(stage: str, bench: Bench, home: Path) -> None:
    child = bench.start(home)
    _wait(lambda: _under_way(stage, home), child, 600)
    child.send_signal(signal.SIGKILL)
    child.wait()


def _under_way(stage: str, home: Path) -> bool:
    for record in home.glob(f"runs/tickets/*/{stage}/stage.json"):
        started = json.loads(record.read_text("utf-8"))
        if not started["done"]:
            return stage not in PROGRESS or _stored(stage, home) >= PROGRESS[stage]
    return False


def _stored(stage: str, home: Path) -> int:
    """Answers that the stage has committed; read beside the process that writes them."""
    import sqlite3

    role = "teacher" if stage == "capture" else "student"
    store = sqlite3.connect(f"file:{home / 'homestill.db'}?mode=ro", uri=True, timeout=30)
    try:
        (count,) = store.execute("SELECT count(*) FROM answers WHERE role = ?", (role,)).fetchone()
    except sqlite3.OperationalError:  # not made yet
        return 0
    finally:
        store.close()
    return int(count)


def _content(home: Path) -> dict[str, str]:
    """The released files' hashes, those of measured times left out."""
    found = releases.current(home / "releases" / "tickets")
    assert found is not None
    return {name: digest for name, digest in found.manifest.files.items() if name != "report.html"}


def _wait(ready: Any, process: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, f"it ended with {process.returncode} before it got there"
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.02)
