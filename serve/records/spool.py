"""Files beside the database that hold what is recorded until it is committed.

    journal-<process>-<random>.spool    one JSON line an entry

A line is one write into the page cache: it survives the death of the process, though not a power cut
before the kernel has written it. Lines go into the current part; the writer takes a part as a whole, and
removes it when its lines are committed. A part is locked as long as its process lives, so what can be
locked by another is an orphan, and is adopted by whoever finds it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

LARGE = 4 * 1024 * 1024
"""Bytes from which a further part is begun while the writer does not come: it reads a part at once."""
SUFFIX = ".spool"

logger = logging.getLogger("serve")


@dataclass
class Part:
    """One file of the spool."""

    path: Path
    descriptor: int
    size: int = 0
    adopted: bool = False
    """Another process wrote it, and died."""

    def lines(self) -> list[bytes]:
        """What was recorded, without a last line that death cut off.

        Raises:
            OSError: it cannot be read.
        """
        *lines, _ = self.path.read_bytes().split(b"\n")
        return lines


class Spool:
    """This process's parts, oldest first. Safe to use from any thread; one thread takes.

    Args:
        folder: where they are.
        large: bytes from which a further part is begun.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path, large: int = LARGE) -> None:
        self._folder = folder
        self._large = large
        self._lock = threading.Lock()
        self._closed = False
        self._full: deque[Part] = deque()
        """Closed to new lines."""
        self._begun = 0
        self._ended = 0
        self._current = _create(folder)

    def append(self, line: bytes) -> None:
        """Keep a line, without its end.

        Raises:
            OSError: the disk is full, or the like; nothing of the line is left.
        """
        data = line + b"\n"
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the journal is closed")
            if self._current.size >= self._large:
                self._next_if_possible()
            part = self._current
            written = os.write(part.descriptor, data)
            if written < len(data):  # the disk filled up half way: half a line would spoil the next one
                os.ftruncate(part.descriptor, part.size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part.path))
            part.size += written

    def take(self) -> Part | None:
        """The oldest part with lines; it stays the oldest until it is `done`. None: all is done.

        Raises:
            OSError: no new part can be begun.
        """
        with self._lock:
            if not self._full and self._current.size:
                self._next()
            return self._full[0] if self._full else None

    def done(self, part: Part) -> None:
        """The oldest part's lines are committed: forget them."""
        with self._lock:
            self._full.popleft()
            self._ended += 1
        _remove(part)

    def waiting(self) -> bool:
        """There are lines that are not done."""
        return bool(self._full or self._current.size)

    def mark(self) -> int:
        """For `reached`: all that has been appended up to now."""
        with self._lock:
            return self._begun + (self._current.size > 0)

    def reached(self, mark: int) -> bool:
        """All that was appended before the mark was taken is done."""
        with self._lock:
            return self._ended >= mark

    def adopt(self) -> int:
        """Take over the parts of dead processes as if they were ours; how many.

        Raises:
            OSError: one cannot be opened.
        """
        found = 0
        for path in self._others():
            part = _lock_orphan(path)
            if part is None:
                continue
            found += 1
            with self._lock:
                self._full.append(part)
                self._begun += 1
        return found

    def foreign(self) -> set[Path]:
        """Parts of other living processes that hold lines now."""
        found = set()
        for path in self._others():
            try:
                if path.stat().st_size:
                    found.add(path)
            except FileNotFoundError:  # committed this moment
                continue
        return found

    def close(self) -> None:
        """End; lines that are not done stay for the next start."""
        with self._lock:
            self._closed = True
            for part in self._full:
                os.close(part.descriptor)
            if self._current.size:
                os.close(self._current.descriptor)
            else:
                _remove(self._current)

    def _others(self) -> list[Path]:
        paths = sorted(self._folder.glob(f"journal-*{SUFFIX}"))
        with self._lock:
            own = {part.path for part in (*self._full, self._current)}
        return [path for path in paths if path not in own]

    def _next(self) -> None:
        part = _create(self._folder)
        self._full.append(self._current)
        self._begun += 1
        self._current = part

    def _next_if_possible(self) -> None:
        try:
            self._next()
        except OSError as error:  # out of descriptors, say: the old part takes further lines as well
            logger.warning("a further part of the journal's spool cannot be begun (%s)", error)


def _create(folder: Path) -> Part:
    while True:
        path = folder / f"journal-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        part = Part(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600))
        fcntl.flock(part.descriptor, fcntl.LOCK_EX)
        if os.fstat(part.descriptor).st_nlink:
            return part
        os.close(part.descriptor)  # taken for an orphan, and removed, before it was locked


def _lock_orphan(path: Path) -> Part | None:
    """A part whose process is dead, locked for us; None where it lives, or another was faster."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return Part(path, descriptor, os.fstat(descriptor).st_size, adopted=True)
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _remove(part: Part) -> None:
    part.path.unlink()
    os.close(part.descriptor)
