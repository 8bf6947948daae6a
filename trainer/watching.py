"""What a watch touches of the outside world: child processes, the journal, signals."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from trainer import process
from trainer.runs import Home

PULSE_S = 30.0


class Stopping:
    """Set once, by a signal handler too: unlike threading.Event it takes no lock that the handler could find taken."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        self._set = False

    def set(self) -> None:
        self._set = True
        os.write(self._writing, b".")

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        """Sleep until it is set, `timeout` seconds at most; whether it is."""
        select.select([self._reading], [], [], timeout)
        return self._set

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


class Child:
    """`homestill run` and `homestill harvest`, in processes of their own.

    Args:
        environment: of the child.
        stopping: set when the watch is to end; the child is interrupted then, and keeps what it has.
        pulse: called every half minute while the child lives.
        command: the command line for a verb (run, harvest) and a task folder; tests give their own.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        stopping: Stopping,
        pulse: Callable[[], None],
        command: Callable[[str, Path], list[str]] | None = None,
    ) -> None:
        self._environment = dict(environment)
        self._stopping = stopping
        self._pulse = pulse
        self._command = command or homestill
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, folder: Path) -> int:
        """Bring the task up to date; the exit code."""
        return self._homestill("run", folder)

    def harvest(self, folder: Path) -> int:
        """Take the teacher's journaled answers as traces; the exit code."""
        return self._homestill("harvest", folder)

    def _homestill(self, verb: str, folder: Path) -> int:
        self._process = subprocess.Popen(self._command(verb, folder), env=self._environment)
        with beating(self._pulse):
            if self._stopping.is_set():  # it was set while the child was started
                self.interrupt()
            code = self._process.wait()
        self._process = None
        return code

    def interrupt(self) -> None:
        """Tell the running child to stop, as Ctrl-C does; safe to call from a signal handler."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)


def homestill(verb: str, folder: Path) -> list[str]:
    """`homestill VERB FOLDER`."""
    return process.module("trainer", verb, folder)


@contextmanager
def beating(pulse: Callable[[], None]) -> Iterator[None]:
    """Call `pulse` now and every half minute while the context lasts."""
    ended = threading.Event()

    def beat() -> None:
        pulse()
        while not ended.wait(PULSE_S):
            pulse()

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def new_answers(home: Home, task: str, since: datetime) -> int:
    """Requests for `task` that the teacher has answered since then and that can be harvested, by the journal.

    Raises:
        StoreError: the journal cannot be read.
    """
    file = home.root / "journal.db"
    if not file.is_file():
        return 0
    from serve.records.reading import reading
    from trainer.seam import translated

    with translated(), reading(file) as journal:
        return journal.harvestable(task, since)


@contextmanager
def stopped_by_signals(stopping: Stopping, interrupt: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT set the event and interrupt what runs, while the context lasts."""

    def handle(*_: object) -> None:
        stopping.set()
        interrupt()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
