"""What the journal's tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from serve.records.entry import Entry, stamp
from serve.records.journal import Journal

ROOT = Path(__file__).parents[3]
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def entry(number: int, task: str | None = "tickets", **values: Any) -> Entry:
    given: dict[str, Any] = {
        "id": f"req_{number}",
        "asked": "tickets",
        "messages": [{"role": "user", "content": f"Größe {number}"}],
        "status": 200,
        "latency_ms": 12.5,
        "overhead_ms": 0.5,
        "task": task,
        "route": "local",
        "reason": "confident",
        "confidence": 0.9,
        "answer": {"role": "assistant", "content": "ok"},
        "endpoint": "chat",
    }
    return Entry(**given | values)


def at(hours: float) -> str:
    return stamp(NOON + timedelta(hours=hours))


def record(journal: Journal, *entries: Entry) -> None:
    for each in entries:
        journal.record(each)
    assert journal.flush(30)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'journal.db'}"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-*.spool"))


def child(program: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that sees the sources; its standard output is read line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def kill(process: subprocess.Popen[str]) -> list[str]:
    """kill -9; what it had said and nobody had read yet, whole lines only."""
    os.kill(process.pid, signal.SIGKILL)
    assert process.stdout and process.stdin
    said = [line for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()
    process.stdin.close()
    return said


def left_by_a_killed_process(folder: Path, lines: bytes, name: str = "1-dead") -> Path:
    """A part of the spool that nobody has locked."""
    path = folder / f"journal-{name}.spool"
    path.write_bytes(lines)
    return path
