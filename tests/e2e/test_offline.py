"""The cable pulled: install, serve and train again in a network namespace without a route, every attempt recorded.

strace records what any code asks of the kernel; where it is not installed, Python's audit hook records what
Python's sockets ask, and the namespace refuses the rest unseen. A control shows that both would notice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.small_day import ROOT, call, questions, require_same, small_task, teacher
from trainer import offline_hook

CONTROL = """\
import socket
for ask in (lambda: socket.create_connection(("192.0.2.1", 443), 2), lambda: socket.getaddrinfo("example.org", 443)):
    try:
        ask()
    except OSError:
        print("refused")
"""
ADDRESS = re.compile(
    r'sa_family=AF_INET6?, .*?(?:inet_addr\("|inet_pton\(AF_INET6, "|sin6_addr=.*?")([^"]+)"'
)
STRACE = [
    "strace",
    "-f",
    "--seccomp-bpf",
    "-qq",
    "-e",
    "signal=none",
    "-e",
    "trace=connect,sendto,sendmsg,sendmmsg",
]


def _namespaces() -> bool:
    command = shutil.which("unshare")
    return (
        bool(command) and subprocess.run([str(command), "-rn", "true"], capture_output=True).returncode == 0
    )


pytestmark = pytest.mark.skipif(not _namespaces(), reason="this machine does not allow network namespaces")


class Recorder:
    """Runs programs without a network and knows where they wanted to go."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._hooked, self._traced = folder / "hook.jsonl", folder / "strace.txt"
        self._strace = [*STRACE, "-o", str(self._traced)] if shutil.which("strace") else []
        self._path = offline_hook.folder_for(self._hooked, folder)

    def run(self, args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """With nothing of this process' environment but PATH."""
        clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self._path), **environment}
        return subprocess.run(
            ["unshare", "-rn", *self._strace, *args],
            env=clean, cwd=ROOT, capture_output=True, text=True, errors="replace",
        )  # fmt: skip

    def outside(self) -> set[str]:
        """Addresses and names beyond this machine that were tried."""
        found = {each["to"] for each in offline_hook.attempts(self._hooked) if not each["local"]}
        if self._strace:
            addresses = {match[1] for match in ADDRESS.finditer(self._traced.read_text(errors="replace"))}
            found |= {each for each in addresses if not offline_hook.is_local(each)}
        return found

    def inside(self) -> int:
        return sum(each["local"] for each in offline_hook.attempts(self._hooked))


def test_the_recorder_sees_connections_and_lookups(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "record")
    done = recorder.run([sys.executable, "-c", CONTROL])
    assert done.stdout.split() == ["refused", "refused"], done.stderr
    seen = recorder.outside()
    assert {"('192.0.2.1', 443)", "example.org"} <= seen
    if shutil.which("strace"):
        assert "192.0.2.1" in seen


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_day_without_a_network(tmp_path: Path) -> None:
    source, bundle, key = tmp_path / "source", tmp_path / "bundle", tmp_path / "box.key"
    task = small_task(tmp_path / "task" / "tickets")
    environment = {**os.environ, "HOMESTILL_HOME": str(source), "HOMESTILL_LOCAL": "embedded"}
    with teacher(tmp_path) as address:
        call(
            "trainer",
            "run",
            task,
            "--force",
            environment=environment | {"HOMESTILL_TEACHER_API_BASE": address},
        )
    arguments = ("--task", task, "--key", key, "--part-size", "0.001")
    call("trainer", "bundle", bundle, *arguments, environment=environment)
    asked = tmp_path / "questions.json"
    asked.write_text(json.dumps(questions(source, 3)), "utf-8")

    recorder, home = Recorder(tmp_path / "record"), tmp_path / "home"
    done = recorder.run(
        [sys.executable, "-m", "tests.e2e.offline_day", str(bundle), f"{key}.pub", str(home), str(asked)],
        HOME=str(tmp_path / "nobody"),
        HOMESTILL_HOME=str(home),
        HOMESTILL_LOCAL="embedded",
        HOMESTILL_OFFLINE="1",
    )

    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    version = (source / "releases/tickets/current").read_text("utf-8").strip()
    assert found["carried"] == version
    assert _content(home, found["trained"]) == _content(source, version), "trained again, it is another model"
    assert {each["route"] for each in found["answers"]} == {"local"}
    require_same(found["answers"], found["again"], tolerance=1e-3, ignore=("release",))
    assert recorder.outside() == set()
    assert recorder.inside() > 0, "nothing was recorded, not even what stays here"


def _content(home: Path, version: str) -> dict[str, str]:
    """The released files' hashes, those of measured times left out."""
    manifest = json.loads((home / "releases/tickets" / version / "manifest.json").read_text("utf-8"))
    return {name: digest for name, digest in manifest["files"].items() if name != "report.html"}
