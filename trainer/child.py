"""A long child process of our own: reports JSON lines, keeps its log, and dies with its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import process

Report = Callable[[dict[str, Any]], None]


def environment(parent: Mapping[str, str]) -> dict[str, str]:
    """What a child gets: the parent's environment, quiet, without the network, on one GPU."""
    one_gpu = {"CUDA_VISIBLE_DEVICES": parent.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return {**parent, **process.QUIET, **process.OFFLINE, **one_gpu}


def run(
    args: Sequence[str],
    *,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    report: Report = lambda _: None,
    timeout: float | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Run a program to its end.

    Args:
        args: as `process.module` gives them; the program should call `process.on_parent_death`.
        folder: where it runs.
        log: gets what it writes to standard error.
        report: called with every JSON object that it prints on a line.
        timeout: seconds after which it is killed.
        stop: set from another thread, it ends the program as the end of this process would.

    Returns:
        The exit code; negative where a signal ended it.
    """
    with (
        open(log, "ab") as errors,
        subprocess.Popen(
            args,
            stdin=subprocess.PIPE,  # never written: its end tells the child that we are gone
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            cwd=folder,
            text=True,
        ) as child,
    ):
        assert child.stdin
        assert child.stdout
        killer = threading.Timer(timeout, child.kill) if timeout else None
        if killer:
            killer.start()
        if stop:
            threading.Thread(target=_leave_when, args=(stop, child), daemon=True).start()
        try:
            for line in child.stdout:
                if line.startswith("{"):
                    report(json.loads(line))
        finally:
            if killer:
                killer.cancel()
            child.stdin.close()
        return child.wait()


def _leave_when(stop: threading.Event, child: subprocess.Popen[str]) -> None:
    while child.poll() is None:
        if stop.wait(0.2):
            assert child.stdin
            child.stdin.close()
            return


def last_line(log: Path) -> str:
    """The last line of a child's log: the error that ended it."""
    return process.Done([], 1, log.read_text(encoding="utf-8", errors="replace")).last_line


def emit(event: str, **values: Any) -> None:
    """In the child: one event to the parent."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def read_spec() -> dict[str, Any]:
    """In the child: the spec named on the command line; from here on the child ends with its parent."""
    process.on_parent_death(lambda: os._exit(1))
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return spec
