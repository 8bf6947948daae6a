"""A second Docker Engine: empty, in a network namespace of its own whose only interface is loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("dockerd", "unshare", "nsenter", "ip")
STARTS_S = 60.0


@dataclass(frozen=True)
class Engine:
    """Where it listens, and the process whose network it has."""

    host: str
    pid: int

    @property
    def inside(self) -> list[str]:
        """Runs a program in its network, with this machine's files."""
        return ["nsenter", "-t", str(self.pid), "-n"]

    def run(
        self, *words: str | Path, environment: dict[str, str] | None = None, folder: Path | None = None
    ) -> str:
        """What a program says in its network, docker its own; AssertionError where it fails."""
        clean = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/root"),
            "DOCKER_HOST": self.host,
        }
        done = subprocess.run(
            [*self.inside, *map(str, words)],
            env=clean | (environment or {}), cwd=folder, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()


def missing() -> str:
    """Why none can be started here; empty where it can."""
    if os.geteuid():
        return "only root can start a second Docker Engine"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} is not installed"
    if subprocess.run(["unshare", "-nm", "true"], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    return ""


@contextmanager
def empty_engine(folder: Path) -> Iterator[Engine]:
    """Start it with all that it keeps in `folder`; stopped after."""
    folder.mkdir()
    socket = f"unix://{folder}/socket"
    options = [f"--{name}={folder / name}" for name in ("data-root", "exec-root", "pidfile")]
    start = 'ip link set lo up && exec dockerd "$@"'  # its mounts go when it goes
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen(
            ["unshare", "-nm", "sh", "-c", start, "dockerd", *options, f"--host={socket}"],
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            found = Engine(socket, process.pid)
            deadline = time.monotonic() + STARTS_S
            while subprocess.run(
                ["docker", "--host", socket, "info"], capture_output=True, timeout=30
            ).returncode:
                late = process.poll() is not None or time.monotonic() > deadline
                assert not late, (folder / "log").read_text(errors="replace")[-3000:]
                time.sleep(0.2)
            yield found
        finally:
            process.terminate()
            process.wait(timeout=180)
    shutil.rmtree(folder)
