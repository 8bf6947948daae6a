"""All four studies as a person starts them, on a short run of the tickets example, killed and gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
TICKETS = ROOT / "examples" / "tickets"
SIZES = {"train": 64, "calibrate": 12, "test": 20}
STUDY = [sys.executable, "-m", "trainer", "study"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Box:
    """A home with a finished run, and the environment to study it in."""

    task: Path
    home: Path
    environment: dict[str, str]

    def study(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*STUDY, *map(str, words)]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=1400
        )

    def done(self, *words: str | Path) -> str:
        result = self.study(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def folder(self, study: str) -> Path:
        return self.home / "studies" / "tickets" / study

    def result(self, study: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder(study) / "result.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The example with few rows and one epoch, run up to register against the stand-in teacher."""
    root = tmp_path_factory.mktemp("studies")
    folder, home = root / "tickets", root / "home"
    (folder / "data").mkdir(parents=True)
    home.mkdir()
    (folder / "base").symlink_to(TICKETS / "base")
    (folder / "program.py").write_bytes((TICKETS / "program.py").read_bytes())
    for split, size in SIZES.items():
        lines = (TICKETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines[:size]), encoding="utf-8")
    settings = yaml.safe_load((TICKETS / "task.yaml").read_text(encoding="utf-8"))
    settings["student"]["train"]["epochs"] = 1
    (folder / "task.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("tickets_demo", TICKETS / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    with demo.teacher(home) as address:
        environment = {
            **os.environ,
            "HOMESTILL_HOME": str(home),
            "HOMESTILL_LOCAL": "embedded",
            "HOMESTILL_TEACHER_API_BASE": address,
            "COLUMNS": "160",
        }
        made = subprocess.run(
            [sys.executable, "-m", "trainer", "run", folder, "--until", "register", "--force"],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        yield Box(folder, home, environment)


def test_demos_killed_and_run_again_asks_nothing_twice(box: Box) -> None:
    words = ["demos", str(box.task), "--most", "2", "--limit", "12", "--context", "2048"]
    rows = box.folder("demos") / "rows.jsonl"
    process = subprocess.Popen([*STUDY, *words], env=box.environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (rows.is_file() and rows.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = rows.read_text(encoding="utf-8").split("\n")[:-1]
    box.done(*words)
    lines = rows.read_text(encoding="utf-8").split("\n")[:-1]
    assert lines[: len(before)] == before
    asked = Counter((row["system"], row["example"]) for row in map(json.loads, lines))
    assert set(asked.values()) == {1} and len(asked) == 6 * 12
    assert "stand-in" in box.result("demos")["notices"][0]
    page = (box.folder("demos") / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    again = rows.stat().st_mtime_ns
    assert "0 of 72 answers are missing" in box.done(*words)
    assert rows.stat().st_mtime_ns == again


def test_instructions(box: Box) -> None:
    said = box.done("instructions", box.task, "--limit", "10")
    assert "as written" in said and "multi-step" in said
    assert len(box.result("instructions")["figures"]["variants"]) == 3


def test_forgetting(box: Box, tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    rows = [{"question": f"The printer {n} is broken.", "answer": f"Printer {n}: broken"} for n in range(8)]
    general.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "report:" in box.done("forgetting", box.task, "--general", general)
    figures = box.result("forgetting")["figures"]
    assert figures["conversations"] == 8
    assert figures["loss"]["before"]["mean"] != figures["loss"]["after"]["mean"]


def test_order_fine_tunes_on_optimised_prompts(box: Box) -> None:
    words = ["order", str(box.task), "--optimizer", "bootstrap", "--examples", "10", "--limit", "12"]
    said = box.done(*words, "--context", "2048")
    assert "budget $20" in said
    recipes = box.result("order")["figures"]["recipes"]
    assert list(recipes)[:4] == ["base", "prompt only", "fine-tune only", "p → w"]
    assert recipes["p → w"]["last_step"]["usd"] > 0
    assert recipes["p → w"]["last_step"]["seconds"] > 1
    (trained,) = (box.folder("order") / "runs").glob("pw-*")  # no other step fine-tunes
    assert json.loads((trained / "capture" / "program.json").read_text(encoding="utf-8"))["triage"]["demos"]
    assert (trained / "register" / "registration.json").is_file()
    again = box.study(*words, "--context", "2048")
    assert again.returncode == 0 and "done in" not in again.stderr  # no stage did anything
    assert box.result("order")["figures"]["recipes"] == recipes
