"""A bundle's way into an empty Docker Engine without a network: verified, loaded, served; the answers are the source's.

Ollama is the tests' double on both sides and the teacher a stand-in: no figure here says anything about models.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Llama
from tests.docker import engine
from tests.docker.empty_engine import Engine, empty_engine
from tests.docker.empty_engine import missing as no_second_engine
from tests.e2e.small_day import ask, call, endpoint, questions, require_same, small_task, teacher
from trainer.bundle.contents import BUNDLE
from trainer.bundle.verify import check, chunks, trusted_key

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(no_second_engine()), reason=no_second_engine()),
    pytest.mark.usefixtures("images"),
]
PLANTED = "sk-planted-teacher-0123456789abcdef"
ASKED = 12
CACHED = 0.05
"""Nats by which a token's log-probability may differ in llama.cpp, by what its cache holds of earlier prompts."""
FILES = "compose.yaml:docker/cpu.yaml:docker/offline.yaml:stand-in.yaml"
STANDIN = f"""\
services:
  ollama:
    image: {engine.TRAINER}
    entrypoint: [python, -m]
    command: [tests.docker.lasting_double]
    environment: {{PYTHONPATH: /stand-in}}
    healthcheck: {{test: [CMD, sh, /stand-in/tests/docker/ollama, list], interval: 1s}}
    volumes: ["./stand-in:/stand-in:ro"]
"""


@dataclass(frozen=True)
class Sent:
    """What left the source box, and what it answered."""

    bundle: Path
    key: str
    asked: Path
    answers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def sent(images: None, tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """A box that trained, answers without its teacher, and writes a bundle; keys lie all around."""
    folder = tmp_path_factory.mktemp("source")
    home, bundle, key = folder / "home", folder / "bundle", folder / "box.key"
    task = small_task(folder / "tickets")
    (task / ".env").write_text(f"OPENAI_API_KEY={PLANTED}\n", "utf-8")
    (folder / "teacher_key").write_text(PLANTED, "utf-8")
    with OllamaDouble(folder / "blobs", Llama()) as ollama, teacher(folder) as address:
        environment = os.environ | {
            "HOMESTILL_HOME": str(home),
            "HOMESTILL_LOCAL": "ollama",
            "OLLAMA_HOST": ollama.url,
            "OPENAI_API_KEY": PLANTED,
            "HOMESTILL_TEACHER_KEY_FILE": str(folder / "teacher_key"),
        }
        call(
            "trainer",
            "run",
            task,
            "--force",
            environment=environment | {"HOMESTILL_TEACHER_API_BASE": address},
        )
        asked = folder / "questions.json"
        asked.write_text(json.dumps(questions(home, ASKED)), "utf-8")
        with endpoint(environment | {"HOMESTILL_OFFLINE": "1"}) as url:
            answers = ask(url, json.loads(asked.read_text("utf-8")))
    images_wanted = ("--image", engine.SERVE, "--image", engine.TRAINER)
    call("trainer", "bundle", bundle, "--task", task, "--key", key, *images_wanted, environment=environment)
    for path in (folder, bundle, *bundle.rglob("*")):  # as a medium that the containers' user can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Sent(bundle, Path(f"{key}.pub").read_text("ascii").strip(), asked, answers)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with empty_engine(tmp_path_factory.mktemp("there") / "engine") as found:
        yield found


def test_no_planted_key_travels(sent: Sent) -> None:
    contents = check(sent.bundle, BUNDLE, trusted_key(sent.key))
    private = (sent.bundle.parent / "box.key").read_bytes().splitlines()[1]
    for file in contents.files:
        tail = b""
        for chunk in chunks(sent.bundle, file):
            assert PLANTED.encode() not in tail + chunk, file.path
            assert private not in tail + chunk, file.path
            tail = chunk[-100:]
        if file.path.endswith(".gz"):
            assert PLANTED.encode() not in gzip.decompress((sent.bundle / file.path).read_bytes()), file.path
    assert not [file.path for file in contents.files if ".env" in file.path and file.section == "tasks"]


def test_the_box_is_loaded_and_answers_as_the_source_does(sent: Sent, there: Engine, tmp_path: Path) -> None:
    assert there.run("docker", "image", "ls", "-q") == ""
    assert there.run("ip", "route", "show", "default") == ""
    tool, trust, box = sent.bundle / "tool.pyz", ("--trust", sent.key), tmp_path / "box"
    assert "verified" in there.run("/usr/bin/python3", tool, "verify", sent.bundle, *trust)
    said = there.run("/usr/bin/python3", tool, "load", sent.bundle, *trust, "--box", box)
    _stand_in(box)
    (box / ".env").write_text(f"COMPOSE_FILE={FILES}\nHOMESTILL_TAG=test\n", "utf-8")
    commands = [line.split() for line in said.splitlines() if line.startswith("  docker compose")]
    assert [words[2] for words in commands] == ["run", "up"]

    first = there.run(*commands[0], folder=box)
    again = there.run(*commands[0], folder=box)
    version = sent.answers[0]["release"]
    assert f"tickets: {version} is current now" in first
    assert f"tickets: {version} is current\n" in again and f"release tickets {version}: is there" in again
    there.run(*commands[1], "serve", "ollama", folder=box)

    key = there.run("docker", "compose", "exec", "-T", "serve", "cat", "/data/first-key", folder=box)
    asking = (sys.executable, "-m", "tests.e2e.small_day", "http://127.0.0.1:8000", key, sent.asked)
    answers = json.loads(there.run(*asking, folder=engine.ROOT).splitlines()[-1])
    assert {each["route"] for each in answers} == {"local"} and len(answers) == ASKED
    require_same(answers, sent.answers, tolerance=CACHED)
    there.run("docker", "compose", "down", "-v", "--timeout", "5", folder=box)


def _stand_in(box: Path) -> None:
    """The double of Ollama, run by the trainer's image from files beside the box."""
    (box / "stand-in.yaml").write_text(STANDIN, "utf-8")
    tests = box / "stand-in" / "tests"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(engine.ROOT / "tests" / "docker" / "standin", tests / "docker", ignore=ignore)
    shutil.copytree(engine.ROOT / "tests" / "contract", tests / "contract", ignore=ignore)
    for package in (tests, tests / "docker"):
        (package / "__init__.py").touch()
    subprocess.run(["chmod", "-R", "a+rX", str(box)], check=True)
