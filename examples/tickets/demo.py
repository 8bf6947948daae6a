"""The whole loop on this machine: no key, no GPU, a stand-in teacher, a small base model.

Starts the stand-in teacher, runs every stage that is not up to date, serves the outcome and asks it
two questions. Meant to be started by scripts/demo, which installs first.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEACHER = HERE.parent / "standin_teacher.py"
QUESTIONS = {
    "a clear ticket": "Hello, Our card was declined although there is enough money on it. Our whole team is blocked. "
    "My customer number is #48213.",
    "a ticket that fits no label": "I write for a newspaper and would like to interview your founders about their early days.",
}
START_TIMEOUT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--serve", action="store_true", help="keep the endpoint up until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="port of the endpoint (default: any free one)")
    options = parser.parse_args()
    home = Path(os.environ.get("HOMESTILL_HOME") or ".demo").resolve()
    environment = {
        **os.environ,
        "HOMESTILL_HOME": str(home),
        "HOMESTILL_LOCAL": os.environ.get("HOMESTILL_LOCAL", "embedded"),
        "HOMESTILL_API_KEYS": "",  # on loopback, for two questions
    }
    home.mkdir(parents=True, exist_ok=True)
    port = options.port or free_port()
    with teacher(home) as address:
        environment["HOMESTILL_TEACHER_API_BASE"] = address
        say("The teacher is a stand-in: it knows the answers from a file and gets 3 % of them wrong.")
        done = subprocess.run([sys.executable, "-m", "trainer", "run", str(HERE)], env=environment)
        if done.returncode:
            return done.returncode
        with endpoint(port, environment, home) as url:
            for name, text in QUESTIONS.items():
                show(name, text, ask(url, text))
            if options.serve:
                say(f"\nThe endpoint is up at {url}/v1 (model: tickets). Ctrl-C ends it.")
                wait_for_interrupt()
    return 0


@contextmanager
def teacher(home: Path) -> Iterator[str]:
    """The stand-in teacher on a free port; gives its address."""
    port_file = home / "teacher.port"
    port_file.unlink(missing_ok=True)
    answers = sorted((HERE / "data").glob("*.jsonl"))
    command = [sys.executable, TEACHER, "--port", "0", "--port-file", port_file, "--inputs", "text"]
    with child([*command, "--answers", *answers], dict(os.environ), home / "teacher.log") as process:
        wait_until(
            lambda: port_file.is_file() and bool(port_file.read_text("utf-8")), process, home / "teacher.log"
        )
        yield f"http://127.0.0.1:{port_file.read_text('utf-8').strip()}/v1"


@contextmanager
def endpoint(port: int, environment: dict[str, str], home: Path) -> Iterator[str]:
    """`homestill serve`; gives its address once it answers."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "trainer", "serve", "--port", str(port)]
    with child(command, environment, home / "serve.log") as process:
        wait_until(lambda: healthy(url), process, home / "serve.log")
        yield url


@contextmanager
def child(command: list[Any], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with this one; what it says goes to a file."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `ready()` holds; give up when the process has ended or took too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"demo: a server did not start; see {log}")
        time.sleep(0.1)


def healthy(url: str) -> bool:
    """The endpoint answers, and the local model of its release is up."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            tasks = json.load(answer)["tasks"]
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return all(task["local"] for task in tasks.values())


def ask(url: str, text: str) -> dict[str, Any]:
    """Ask as any OpenAI client does, with the messages that the task's DSPy program sends."""
    body = {"model": "tickets", "messages": messages(text)}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def messages(text: str) -> list[dict[str, str]]:
    """The chat messages of DSPy's adapter for the task's signature."""
    import dspy

    sys.path.insert(0, str(HERE))
    from program import Ticket

    rendered: list[dict[str, str]] = dspy.ChatAdapter().format(Ticket, [], {"text": text})
    return rendered


def show(name: str, text: str, answer: dict[str, Any]) -> None:
    decision = answer["homestill"]
    say(f"\n{name}: {text}")
    confidence = (
        "" if decision.get("confidence") is None else f", confidence {float(decision['confidence']):.3f}"
    )
    say(f"  answered by {decision['route']} ({decision['reason']}{confidence}), model {answer['model']}")
    for line in answer["choices"][0]["message"]["content"].split("\n\n"):
        if "completed" not in line:
            say(f"  {line.replace('[[ ## ', '').replace(' ## ]]', ': ').replace(chr(10), '')}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        say("stopped")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
