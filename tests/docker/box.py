"""A whole box for tests: compose with the stand-ins, a small task, and clients that never stop asking."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.docker import engine

FILES = "compose.yaml:docker/cpu.yaml:tests/docker/standins.yaml"
SERVICES = ("ollama", "teacher", "trainer", "serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Box:
    """`docker compose` for one project, with the images of the tests.

    Args:
        project: its name; volumes and networks go by it.
        tasks: the folder of task folders.
        teacher_key: a file.
    """

    project: str
    tasks: Path
    teacher_key: Path
    port: int = field(default_factory=free_port)
    seconds: float = 0.0
    """From `up` to the first answer."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COMPOSE_FILE": FILES,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_DISABLE_ENV_FILE": "1",
            "HOMESTILL_TAG": "test",
            "STANDIN_IMAGE": engine.STANDIN,
            "TASKS": str(self.tasks),
            "TEACHER_KEY_FILE": str(self.teacher_key),
            "HOMESTILL_PORT": str(self.port),
            "HOMESTILL_TEACHER_API_BASE": "http://teacher:8899/v1",
            "HOMESTILL_TEACHER_MODEL": "standin-teacher",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def compose(self, *words: str, timeout: float = 300, check: bool = True) -> str:
        return engine.docker(
            "compose", *words, timeout=timeout, check=check, environment=self.environment, folder=engine.ROOT
        )

    def container(self, service: str) -> str:
        return self.compose("ps", "-aq", service)

    def state(self, service: str) -> Any:
        return engine.inspect(self.container(service))

    def kill(self, service: str) -> None:
        """End a container's processes as the kernel does when memory runs out: nobody asked the engine to."""
        os.kill(int(self.state(service)["State"]["Pid"]), signal.SIGKILL)

    def read(self, path: str, service: str = "serve") -> str:
        """A file of the box; empty where there is none."""
        return self.compose("exec", "-T", service, "sh", "-c", f"cat {path} 2>/dev/null || true")

    def python(self, service: str, code: str) -> str:
        """The last line that a Python program says in a container."""
        said = self.compose("exec", "-T", service, "sh", "-c", 'python -c "$1" 2>&1 || true', "sh", code)
        return said.splitlines()[-1] if said else ""

    def logs(self) -> str:
        command = ["docker", "compose", "logs", "--no-color"]
        env = {**os.environ, **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, cwd=engine.ROOT, env=env, timeout=60)
        return done.stdout + done.stderr

    def down(self) -> None:
        self.compose("down", "-v", "--timeout", "5")

    def ask(self, key: str, text: str, timeout: float = 60) -> dict[str, Any]:
        """One chat request with the prompt of the ticket task."""
        body = json.dumps({"model": "tickets", "messages": prompt(text)}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@dataclass
class Traffic:
    """Asks one question after the other in a thread, and counts the answers by route and reason."""

    box: Box
    key: str
    texts: list[str]
    answered: Counter[str] = field(default_factory=Counter)
    releases: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=90)

    def _ask(self) -> None:
        number = 0
        while not self._end.wait(0.1):
            number += 1
            try:
                said = self.box.ask(self.key, self.texts[number % len(self.texts)])["homestill"]
            except (OSError, ValueError) as error:
                detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                self.lost.append(f"{error!r} {detail[:300]}")
            else:
                self.answered[f"{said['route']}/{said['reason']}"] += 1
                self.releases[str(said.get("release"))] += 1


def prompt(text: str) -> list[dict[str, str]]:
    """The chat messages of DSPy's adapter for the ticket task."""
    import dspy

    from examples.tickets.program import Ticket

    messages: list[dict[str, str]] = dspy.ChatAdapter().format(Ticket, [], {"text": text})
    return messages


def wait_for(what: str, ready: Callable[[], bool], seconds: float) -> float:
    """Wait until `ready()` holds; how long that took. AssertionError when it takes too long."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < seconds, f"{what} took more than {seconds} s"
        time.sleep(0.25)
    return time.monotonic() - started


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
