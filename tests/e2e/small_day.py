"""What tests of a whole day share: a small task, the stand-in teacher, an endpoint, and questions to it.

As a program it asks: URL KEY QUESTIONS, the last a file of JSON; it prints the answers as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TICKETS = ROOT / "examples" / "tickets"
SIZES = {"train": 64, "calibrate": 24, "test": 16}
PATIENCE_S = 300.0

Messages = list[dict[str, str]]


def small_task(folder: Path) -> Path:
    """The ticket task with so few rows that it is trained in seconds; good for nothing but to be there."""
    import yaml

    shutil.copytree(TICKETS, folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    (folder / "data").mkdir()
    for split, size in SIZES.items():
        lines = (TICKETS / "data" / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines[:size]), "utf-8")
    settings = yaml.safe_load((folder / "task.yaml").read_text("utf-8"))
    settings["student"]["train"].update(epochs=1, eval_steps=4)
    (folder / "task.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    return folder


@contextmanager
def teacher(folder: Path) -> Iterator[str]:
    """The stand-in teacher; its address."""
    port, answers = folder / "port", sorted((TICKETS / "data").glob("*.jsonl"))
    command = [sys.executable, "-u", str(ROOT / "examples/standin_teacher.py"), "--port", "0"]
    options = ["--inputs", "text", "--port-file", str(port), "--latency-ms", "1", "--answers"]
    with subprocess.Popen(
        [*command, *options, *map(str, answers)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while not port.is_file() or not port.read_text("utf-8").strip():
                assert process.poll() is None, "the stand-in teacher did not start"
            yield f"http://127.0.0.1:{port.read_text('utf-8').strip()}/v1"
        finally:
            process.terminate()


def call(module: str, *arguments: str | Path, environment: Mapping[str, str]) -> str:
    """Run a module of ours to its end; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=dict(environment), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def questions(home: Path, count: int) -> list[Messages]:
    """Prompts that the teacher was asked."""
    from trainer.runs import Home, read_json
    from trainer.traces import Store

    summary = read_json(next(home.glob("runs/tickets/*/capture/summary.json")))
    with closing(Store.open(Home(home).database_url)) as store:
        answers = store.answers(summary["system"])
    return [answers[name].calls[0]["messages"] for name in sorted(answers)[:count]]


@contextmanager
def endpoint(environment: Mapping[str, str]) -> Iterator[str]:
    """`python -m serve` while the context lasts; its address, once it answers from its models."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve", "--port", str(port)]
    with subprocess.Popen(command, env=dict(environment), cwd=ROOT, stdout=sys.stderr.fileno()) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until_healthy(url, process)
            yield url
        finally:
            process.terminate()


def until_healthy(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until every task of the endpoint answers locally."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
                if all(task["local"] for task in json.load(answer)["tasks"].values()):
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    raise SystemExit("the endpoint did not come up")


def ask(url: str, asked: list[Messages], key: str = "") -> list[dict[str, Any]]:
    """Each answer's text, route, reason and release, and the log-probability of every token of it."""
    answers = []
    for messages in asked:
        body = {"model": "tickets", "messages": messages, "seed": 1, "temperature": 0, "logprobs": True}
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as reply:
            found = json.load(reply)
        (choice,) = found["choices"]
        told = {name: found["homestill"].get(name) for name in ("route", "reason", "release")}
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        answers.append({"text": choice["message"]["content"], "logprobs": logprobs, **told})
    return answers


def require_same(
    answers: list[dict[str, Any]],
    others: list[dict[str, Any]],
    *,
    tolerance: float,
    ignore: tuple[str, ...] = (),
) -> None:
    """AssertionError unless all is equal but what is ignored; log-probabilities within the tolerance, in nats."""
    assert len(answers) == len(others)
    for one, other in zip(answers, others, strict=True):
        for name in {"text", "route", "reason", "release"} - set(ignore):
            assert one[name] == other[name], (one, other)
        pairs = zip(one["logprobs"], other["logprobs"], strict=True)
        assert max(abs(mine - theirs) for mine, theirs in pairs) <= tolerance, (one, other)


def main() -> None:
    url, key, file = sys.argv[1:4]
    until_healthy(url)
    sys.stdout.write(json.dumps(ask(url, json.loads(Path(file).read_text("utf-8")), key)) + "\n")


if __name__ == "__main__":
    assert os.getcwd() == str(ROOT)
    main()
