"""`homestill doctor --offline` says what would call out, and its recorder would notice."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.tasks import write_task
from trainer.doctor import Finding
from trainer.offline_check import _converter, _switch, _tasks, _teacher, examine, self_test
from trainer.offline_hook import attempts, folder_for, is_local
from trainer.process import run
from trainer.runs import Home

QUIET_CODE = "import os; assert os.environ['HOMESTILL_OFFLINE'] == '1'"
LOUD_CODE = """\
import socket
try:
    socket.getaddrinfo("hub.example.org", 443)
except OSError:
    pass
"""


def _environment(**values: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **values}


def test_a_quiet_program_passes_and_a_loud_one_is_named() -> None:
    assert next(self_test(_environment(), QUIET_CODE)).state == "ok"
    loud = next(self_test(_environment(), LOUD_CODE))
    assert (loud.state, "hub.example.org" in loud.text) == ("missing", True)
    broken = next(self_test(_environment(), "raise SystemExit('no such module')"))
    assert (broken.state, "no such module" in broken.text) == ("missing", True)


def test_the_hook_tells_this_machine_from_others(tmp_path: Path) -> None:
    for here in (
        ("127.0.0.1", 1),
        ("::1", 1, 0, 0),
        "/run/socket",
        "localhost",
        None,
        ("0.0.0.0", 0),
        b"127.0.0.9",
    ):
        assert is_local(here), here
    for away in (("192.0.2.1", 443), "example.org", "10.0.0.1", ("fe80::1%eth0", 1, 0, 2), b"example.org"):
        assert not is_local(away), away


def test_every_python_child_is_watched(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = _environment(PYTHONPATH=str(folder_for(log, tmp_path)))
    child = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {child!r}])"
    assert run([sys.executable, "-c", code], timeout=60, environment=environment).code == 0
    assert [(each["event"], each["local"]) for each in attempts(log)] == [("socket.connect", True)]
    assert attempts(tmp_path / "none") == []


def test_the_switch_and_the_teacher(tmp_path: Path) -> None:
    assert _switch({"HOMESTILL_OFFLINE": "1"}).state == _teacher({"HOMESTILL_OFFLINE": "1"}).state == "ok"
    assert _switch({}).state == "missing"
    assert _teacher({"OPENAI_API_KEY": "k"}).state == "missing"


def test_a_missing_converter_or_base_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_task(tmp_path / "tasks" / "words", student={"base": "nobody/nothing-of-the-kind"})
    write_task(tmp_path / "tasks" / "own", name="own", student={"base": "base"})
    (tmp_path / "tasks" / "own" / "base").mkdir()
    (tmp_path / "tasks" / "broken").mkdir()
    (tmp_path / "tasks" / "broken" / "task.yaml").write_text("name: 1\n")
    found = {each.name: each.state for each in _tasks(home)}
    assert found == {"task words": "missing", "task own": "ok", "task broken": "missing"}
    assert _converter({"HOMESTILL_LLAMA_CPP": str(tmp_path)}).state == "missing"


@pytest.mark.slow
def test_nothing_of_ours_calls_out(tmp_path: Path) -> None:
    findings = examine(Home(tmp_path), _environment(HOMESTILL_OFFLINE="1", HOME=str(tmp_path)))
    assert [each for each in findings if each.state == "missing"] == [], findings
    assert isinstance(findings[0], Finding)
