"""The whole box with stand-ins: it serves at once, trains, goes live, and gets over kills. Ollama is the tests'
double and the teacher the stand-in of the examples: no figure of these tests says anything about models.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.docker import engine
from tests.docker.box import SERVICES, Box, Traffic, healthy, wait_for

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("images"),
]
TICKETS = engine.ROOT / "examples" / "tickets"
ROWS = {"train": 160, "calibrate": 32, "test": 32}
PLANTED = "sk-planted-teacher-0123456789abcdef"
KILLS = 10
TRAINS_S = 1500


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The demo's task, cut to what trains in two minutes, in a box that is up."""
    folder = tmp_path_factory.mktemp("box")
    task = folder / "tasks" / "tickets"
    shutil.copytree(TICKETS, task, ignore=shutil.ignore_patterns("__pycache__"))
    for split, rows in ROWS.items():
        file = task / "data" / f"{split}.jsonl"
        file.write_text("".join(file.read_text("utf-8").splitlines(True)[:rows]), "utf-8")
    settings = yaml.safe_load((task / "task.yaml").read_text("utf-8"))
    settings["student"]["train"]["epochs"] = 1
    settings["student"]["max_tokens"] = 80
    (task / "task.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    key = folder / "teacher_key"
    key.write_text(f"{PLANTED}\n", "utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    found = Box("homestill-test", folder / "tasks", key)
    found.down()
    try:
        yield found
    finally:
        found.down()


@pytest.fixture(scope="module")
def key(box: Box) -> str:
    """The key that the box made for itself, once it answers; the first test looks at how long that takes."""
    started = time.monotonic()
    box.compose("up", "-d", "--no-build")
    wait_for("the endpoint", lambda: healthy(box.url), 60)
    box.seconds = time.monotonic() - started
    return box.read("/data/first-key").strip()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (TICKETS / "data" / "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def current(box: Box) -> str:
    return box.read("/data/releases/tickets/current").strip()


def test_it_answers_within_seconds_through_the_teacher(box: Box, key: str, texts: list[str]) -> None:
    assert box.seconds < 20, f"{box.seconds:.1f} s"
    said = box.ask(key, texts[0])
    assert said["homestill"]["route"] == "teacher"
    assert said["model"] == "standin-teacher"


def test_nobody_is_let_in_without_the_key(box: Box, key: str, texts: list[str]) -> None:
    with pytest.raises(OSError, match="401"):
        box.ask("wrong", texts[0])


def test_containers_are_as_closed_as_they_were_asked_to_be(box: Box, key: str) -> None:
    for service in SERVICES:
        wait_for(f"{service} to be up", lambda service=service: running(box, service), 60)  # type: ignore[misc]
        host = box.state(service)["HostConfig"]
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
        status = box.compose("exec", "-T", service, "cat", "/proc/1/status")
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert lines["Uid"].split() == ["10001"] * 4
        assert int(lines["CapEff"], 16) == 0
        assert lines["NoNewPrivs"] == "1"
        assert "Read-only" in box.compose("exec", "-T", service, "sh", "-c", "touch /x 2>&1 || true")


def test_ollama_reaches_nothing_outside(box: Box, key: str) -> None:
    networks = box.state("teacher")["NetworkSettings"]["Networks"]
    address = next(iter(networks.values()))["IPAddress"]
    connect = f"import socket; socket.create_connection(('{address}', 8899), timeout=5); print('reached')"
    said = {name: box.python(name, connect) for name in ("serve", "ollama")}
    assert said["serve"] == "reached"  # the address is one that can be reached from the outer network
    assert "timed out" in said["ollama"] or "unreachable" in said["ollama"]


def test_it_trains_and_goes_live_without_a_dropped_request(box: Box, key: str, texts: list[str]) -> None:
    # so few examples certify nothing: local answers are asked for, to see that the way through Ollama works
    box.compose(
        "exec", "-T", "serve", "sh", "-c", "printf 'defaults: {strategy: always-local}\\n' >/data/serve.yaml"
    )
    box.compose("restart", "--no-deps", "serve")
    wait_for("the endpoint", lambda: healthy(box.url), 60)
    with Traffic(box, key, texts) as traffic:
        wait_for("the training", lambda: bool(current(box)), TRAINS_S)
        version = current(box)
        wait_for("the release to go live", lambda: traffic.releases[version] >= 20, 120)
    assert traffic.lost == []
    assert traffic.releases["None"] > 0
    assert sum(count for route, count in traffic.answered.items() if route.startswith("local/")) >= 20


def test_the_box_gets_over_kills_by_itself(box: Box, key: str, texts: list[str]) -> None:
    wait_for("the training", lambda: bool(current(box)), TRAINS_S)
    version = current(box)
    source = random.Random(11)
    victims = [*SERVICES, *(source.choice(SERVICES) for _ in range(KILLS - len(SERVICES)))]
    source.shuffle(victims)
    before_all = journaled(box)
    for number, victim in enumerate(victims):
        before = box.state(victim)["RestartCount"]
        box.kill(victim)
        wait_for(f"{victim} to come back", lambda v=victim, b=before: came_back(box, v, b), 90)  # type: ignore[misc]
        wait_for("the endpoint", lambda: healthy(box.url), 60)
        assert box.ask(key, texts[number])["homestill"]["route"] in ("local", "teacher")
    assert current(box) == version
    wait_for("a local answer", lambda: box.ask(key, texts[0])["homestill"]["route"] == "local", 120)
    wait_for("the journal", lambda: journaled(box) >= before_all + len(victims), 30)


def test_what_docker_was_told_to_kill_comes_back_with_the_next_up(
    box: Box, key: str, texts: list[str]
) -> None:
    """The engine takes `docker kill` for a person's wish, and does not restart."""
    for service in SERVICES:
        box.compose("kill", service)
    assert [box.state(service)["State"]["Running"] for service in SERVICES] == [False] * len(SERVICES)

    box.compose("up", "-d", "--no-build")

    wait_for("the endpoint", lambda: healthy(box.url), 60)
    wait_for("a local answer", lambda: box.ask(key, texts[0])["homestill"]["route"] == "local", 120)
    assert [box.state(service)["State"]["Running"] for service in SERVICES] == [True] * len(SERVICES)


def test_no_secret_is_in_logs_or_settings_of_a_container(box: Box, key: str) -> None:
    logs = box.logs()
    assert "capture: done" in logs  # the trainer's are there
    for secret in (PLANTED, key):
        assert secret not in logs
        for service in ("setup", *SERVICES):
            assert secret not in json.dumps(box.state(service))


def test_the_trainer_ends_in_order(box: Box, key: str) -> None:
    started = time.monotonic()
    box.compose("stop", "trainer")
    assert time.monotonic() - started < 60
    assert box.state("trainer")["State"]["ExitCode"] == 0


def journaled(box: Box) -> int:
    """Requests in the journal."""
    query = (
        "sqlite3.connect('file:/data/journal.db?mode=ro', uri=True).execute('select count(*) from requests')"
    )
    return int(box.python("serve", f"import sqlite3; print({query}.fetchone()[0])"))


def running(box: Box, service: str) -> bool:
    return bool(box.state(service)["State"]["Running"])


def came_back(box: Box, service: str, restarts: int) -> bool:
    state = box.state(service)
    return bool(state["RestartCount"] > restarts and state["State"]["Running"])
