"""Releases are whole or not there, the same outcome is the same release, and the gate keeps worse ones out."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import interface
from serve import release as releases
from serve.manifest import Manifest
from serve.runtime.embedded import Endpoint
from serve.upstreams.local import EmbeddedLocal
from serve.upstreams.upstream import connect
from tests.finished import finished_run, opened
from trainer import certify, release
from trainer.errors import ReleaseError
from trainer.runs import Run, read_json, write_json
from trainer.settings import TaskSettings

SOUND = {"prompt_tokens_equal": True, "answers_equal": 1.0, "metric_delta": 0.0, "fault": None}
KEPT = {"keep": 0.8, "confidence": 0.9}
"""A contract that the small run can prove."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, to copy from."""
    root = tmp_path_factory.mktemp("original")
    finished_run(root, quality=KEPT).store.close()
    return root


@pytest.fixture
def here(original: Path, tmp_path: Path) -> Iterator[Run]:
    shutil.copytree(original, tmp_path / "copy")
    run = opened(tmp_path / "copy")
    yield run
    run.store.close()


def page(run: Run, manifest: Manifest, reasons: Sequence[str]) -> str:
    """A report in short; the real one has its own tests."""
    return f"{run.task.name} {manifest.version} {'; '.join(reasons)}"


def made(run: Run, minute: int = 0) -> dict[str, Any]:
    start = datetime(2026, 11, 20, 22, 15, tzinfo=UTC)
    release.run(run, clock=lambda: start + timedelta(minutes=minute), render=page)
    summary: dict[str, Any] = read_json(run.stage("release") / "summary.json")
    return summary


def folder(run: Run) -> Path:
    return run.home.releases(run.task.name)


def current(run: Run) -> Manifest:
    found = releases.current(folder(run))
    assert found is not None
    return found.manifest


def retrained(run: Run, weights: str, student: float | None = None) -> None:
    """Another training's outcome: other weights, and where given another student's score."""
    (run.stage("export") / "model.gguf").unlink()
    (run.stage("export") / "model.gguf").write_text(weights)
    sha = hashlib.sha256(weights.encode()).hexdigest()
    exported = read_json(run.stage("export") / "summary.json")
    exported["model"]["sha256"] = sha
    write_json(run.stage("export") / "summary.json", exported)
    router = read_json(run.stage("certify") / "router.json")
    router["binds"]["model"] = sha
    write_json(run.stage("certify") / "router.json", router)
    if student is not None:
        evaluated = read_json(run.stage("evaluate") / "summary.json")
        evaluated["student"] |= {"mean": student, "low": student - 0.05, "high": student + 0.05}
        write_json(run.stage("evaluate") / "summary.json", evaluated)


def test_the_first_release_is_whole_and_current(here: Run) -> None:
    summary = made(here)
    manifest = current(here)
    assert summary["promoted"]
    assert manifest.version == summary["version"]
    assert manifest.version.startswith("20261120T221500Z-")
    assert set(manifest.files) == {
        "model.gguf",
        "router.json",
        "neighbours.npz",
        "interface.json",
        "program.json",
        "program.py",
        "task.yaml",
        "report.html",
    }
    assert manifest.router.certified
    assert manifest.data.train == 60
    assert manifest.scores["hybrid"].n == 40
    assert manifest.cost_per_1k_usd["hybrid"] == pytest.approx(2.1 * (1 - manifest.router.local_share))
    assert manifest.teacher.stand_in


def test_the_released_task_is_the_validated_one(here: Run) -> None:
    made(here)
    text = (folder(here) / current(here).version / "task.yaml").read_text()
    assert TaskSettings.model_validate(yaml.safe_load(text)) == here.task.settings


def test_the_same_outcome_is_the_same_release(here: Run) -> None:
    first = made(here)
    (here.stage("release") / "summary.json").unlink()
    assert made(here, minute=5) == first
    assert releases.versions(folder(here)) == [first["version"]]


def test_a_rerun_whose_times_differ_is_the_same_release(here: Run) -> None:
    first = made(here)
    evaluated = read_json(here.stage("evaluate") / "summary.json")
    evaluated["student"]["latency_ms"]["p50"] += 1
    write_json(here.stage("evaluate") / "summary.json", evaluated)
    assert made(here, minute=5)["version"] == first["version"]


def test_a_new_outcome_is_a_new_release(here: Run) -> None:
    first = made(here)
    retrained(here, "other weights")
    second = made(here, minute=5)
    assert second["version"] != first["version"]
    assert current(here).version == second["version"]
    assert releases.load(folder(here) / first["version"]).version == first["version"]


def test_a_killed_release_leaves_nothing_to_see_and_the_next_run_cleans_up(here: Run) -> None:
    (here.stage("certify") / "router.json").rename(here.stage("certify") / "hidden")
    with pytest.raises(FileNotFoundError):
        made(here)
    assert releases.versions(folder(here)) == []
    assert releases.current(folder(here)) is None
    (here.stage("certify") / "hidden").rename(here.stage("certify") / "router.json")
    left = folder(here) / ".20261120T221500Z-1.partial"
    left.mkdir()
    (left / "model.gguf").write_text("half")
    made(here)
    assert [path.name for path in folder(here).iterdir() if path.name.startswith(".")] == []


def test_a_release_that_was_made_but_not_promoted_by_a_kill_is_promoted_by_the_next_run(here: Run) -> None:
    first = made(here)
    (folder(here) / "current").unlink()
    assert made(here, minute=5)["version"] == first["version"]
    assert current(here).version == first["version"]


def test_an_altered_release_of_the_same_content_is_an_error(here: Run) -> None:
    first = made(here)
    (folder(here) / first["version"] / "program.json").write_text("{}")
    (folder(here) / "current").unlink()
    with pytest.raises(ReleaseError, match=r"program\.json is not the file that was released"):
        made(here, minute=5)


def test_the_model_is_not_copied(here: Run) -> None:
    made(here)
    released = folder(here) / current(here).version / "model.gguf"
    assert released.samefile(here.stage("export") / "model.gguf")


def test_a_worse_student_is_kept_but_not_promoted(here: Run) -> None:
    first = made(here)
    retrained(here, "worse weights", student=0.3)
    second = made(here, minute=5)
    assert not second["promoted"]
    assert "worse by more than chance" in second["reasons"][0]
    assert second["compared_with"] == first["version"]
    assert current(here).version == first["version"]
    kept = folder(here) / second["version"]
    assert read_json(kept / "gate.json")["promoted"] is False
    assert "worse by more than chance" in (kept / "report.html").read_text()
    assert releases.load(kept).version == second["version"]


def test_a_student_that_is_worse_by_chance_is_promoted(here: Run) -> None:
    made(here)
    before = current(here).scores["student"].mean
    retrained(here, "about as good", student=before - 0.02)
    assert made(here, minute=5)["promoted"]


def test_an_unusable_current_release_does_not_block_a_new_one(here: Run) -> None:
    first = made(here)
    (folder(here) / first["version"] / "task.yaml").write_text("altered")
    retrained(here, "other weights")
    second = made(here, minute=5)
    assert second["promoted"]
    assert "task.yaml" in second["note"]


def test_rollback_goes_to_the_promoted_release_before(here: Run) -> None:
    first = made(here)
    retrained(here, "worse weights", student=0.3)
    made(here, minute=1)
    retrained(here, "better weights", student=0.95)
    third = made(here, minute=2)
    assert current(here).version == third["version"]
    assert release.rollback(here.home, "words") == first["version"]
    assert current(here).version == first["version"]
    gates = [read_json(folder(here) / each / "gate.json") for each in releases.versions(folder(here))]
    assert [gate["promoted"] for gate in gates] == [True, False, True]


def test_rollback_to_a_named_release(here: Run) -> None:
    made(here)
    retrained(here, "worse weights", student=0.3)
    refused = made(here, minute=1)
    assert release.rollback(here.home, "words", refused["version"]) == refused["version"]
    assert current(here).version == refused["version"]


def test_rollback_checks_the_files_first(here: Run) -> None:
    first = made(here)
    retrained(here, "other weights")
    second = made(here, minute=1)
    (folder(here) / first["version"] / "router.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"router\.json is not the file that was released"):
        release.rollback(here.home, "words")
    assert current(here).version == second["version"]


def test_rollback_without_an_earlier_release_says_so(here: Run) -> None:
    with pytest.raises(ReleaseError, match="no release in use"):
        release.rollback(here.home, "words")
    first = made(here)
    with pytest.raises(ReleaseError, match="no promoted release before"):
        release.rollback(here.home, "words")
    with pytest.raises(ReleaseError, match=rf"no release x; there are: {first['version']}"):
        release.rollback(here.home, "words", "x")


def test_a_program_outside_the_task_folder_is_an_error(here: Run) -> None:
    program = here.task.folder / "program.py"
    (here.task.folder.parent / "outside.py").write_text(program.read_text())
    settings = here.task.settings.model_copy(update={"program": "../outside.py:Sorter"})
    with pytest.raises(ReleaseError, match=r"outside\.py lies outside the task folder"):
        made(replace(here, task=replace(here.task, settings=settings)))


def test_the_modules_that_the_program_imports_travel_with_it(here: Run) -> None:
    task = here.task.folder
    (task / "rules").mkdir()
    (task / "rules" / "words.py").write_text("import other_one\n")
    (task / "other_one.py").write_text("")
    (task / "not_imported.py").write_text("")
    program = task / "program.py"
    program.write_text("import rules.words\n" + program.read_text())
    made(here)
    released = folder(here) / current(here).version
    names = {path.relative_to(released).as_posix() for path in released.rglob("*.py")}
    assert names == {"program.py", "rules/words.py", "other_one.py"}
    assert names <= current(here).files.keys()


def test_a_release_tells_what_the_program_takes_and_gives(here: Run) -> None:
    made(here)
    loaded = releases.load(folder(here) / current(here).version)
    assert loaded.interface is not None
    assert interface.read(loaded.interface) == interface.Interface(
        inputs={"text": {"type": "string"}},
        outputs={"label": {"enum": ["even", "odd"], "type": "string"}},
        optional=[],
        predictors=["sort"],
    )


def test_inputs_follow_settings_and_files(here: Run) -> None:
    before = release.inputs(here)
    assert release.inputs(here) == before
    retrained(here, "other weights")
    assert release.inputs(here) != before


def test_outcome_shows_every_system_and_who_is_current(here: Run) -> None:
    first = made(here)
    found = release.outcome(here)
    assert [row[0] for row in found.rows] == ["teacher", "base", "student", "hybrid"]
    assert "stand-in" in found.lines[0]
    assert f"release {first['version']} is current" in found.lines
    assert found.lines[-1].endswith("report.html")


def manifest_with(here: Run, **changes: Any) -> Manifest:
    """The run's manifest with parts replaced."""
    made(here)
    return current(here).model_copy(update=changes)


@pytest.mark.parametrize(
    ("parity", "part"),
    [
        ({"prompt_tokens_equal": False}, "does not get the tokens"),
        ({"metric_delta": -0.05, "evidence": {"answers": {"n": 100}}}, "scores 0.050 lower"),
        ({"fault": "the server adds a second BOS"}, "a second BOS"),
    ],
)
def test_broken_parity_is_not_promoted(here: Run, parity: dict[str, Any], part: str) -> None:
    (reason,) = release.gate(manifest_with(here), None, SOUND | parity)
    assert part in reason


@pytest.mark.parametrize(
    "parity", [{}, {"metric_delta": None}, {"metric_delta": -0.01}, {"metric_delta": 0.1}]
)
def test_sound_parity_is_promoted(here: Run, parity: dict[str, Any]) -> None:
    assert release.gate(manifest_with(here), None, SOUND | parity) == []


@pytest.mark.parametrize("rows", range(30, 65))
def test_one_example_of_few_is_no_evidence_against_parity(here: Run, rows: int) -> None:
    lost = {"metric_delta": round(-1 / rows, 6), "evidence": {"answers": {"n": rows}}}
    assert release.gate(manifest_with(here), None, SOUND | lost) == []
    lost["metric_delta"] = round(-2 / rows, 6)
    assert "parity is broken" in release.gate(manifest_with(here), None, SOUND | lost)[0]


def test_a_lost_certificate_is_not_promoted(here: Run) -> None:
    old = manifest_with(here)
    router = old.router.model_copy(update={"certified": False, "threshold": None})
    new = old.model_copy(update={"router": router})
    assert release.gate(new, old, SOUND) == [f"nothing could be certified, and {old.version} is certified"]
    assert release.gate(new, new, SOUND) == []


def test_an_adapter_is_released_with_the_base_that_it_is_put_on(tmp_path: Path) -> None:
    run = finished_run(tmp_path, quality=KEPT, student={"deliver": "adapter"})
    export, files = run.stage("export"), {"base.gguf": b"the base", "adapter.gguf": b"the adapter"}
    for name, content in files.items():
        (export / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    exported = read_json(export / "summary.json")
    exported["model"]["sha256"], exported["base"]["sha256"] = sums["adapter.gguf"], sums["base.gguf"]
    write_json(export / "summary.json", exported | {"deliver": "adapter"})
    certify.run(run)
    made(run)
    found = releases.current(folder(run))
    assert found is not None
    assert found.lora is not None
    assert (found.model.name, found.lora.name) == ("base.gguf", "adapter.gguf")
    assert found.model.samefile(export / "base.gguf"), "no second copy on the disk"
    assert not (found.folder / "model.gguf").exists()
    assert (found.router.binds.model, found.router.binds.base) == (sums["adapter.gguf"], sums["base.gguf"])
    started: list[tuple[Path, Path | None]] = []

    class Started:
        def __init__(self, gguf: Path, *, adapter: Path | None, **_: Any) -> None:
            started.append((gguf, adapter))

        def start(self) -> Endpoint:
            return Endpoint("http://127.0.0.1:9/v1", "words")

    asyncio.run(EmbeddedLocal(connect(proxies=False), Started).start(found))  # type: ignore[arg-type]  # a double
    assert started == [(found.model, found.lora)]
    router = read_json(found.folder / "router.json")
    del router["binds"]["base"]
    write_json(found.folder / "router.json", router)
    text = found.manifest.text().replace(
        found.manifest.files["router.json"], releases.file_digest(found.folder / "router.json")
    )
    (found.folder / "manifest.json").write_text(text)
    with pytest.raises(releases.ReleaseInvalid, match=r"base that router\.json binds is None"):
        releases.load(found.folder)
    run.store.close()
