"""What may go is said first; what a rollback, a kept run or Ollama still needs never goes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trainer.errors import BusyError, RuntimeUnavailable
from trainer.keeping.prune import Plan, Policy, carry_out, plan
from trainer.runs import Home, locked

DAY = 86_400.0
NOW = 1000 * DAY
OLD = NOW - 100 * DAY


def version(number: int) -> str:
    return f"202611{number:02}T000000Z-0000000{number}"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def model(number: int, role: str = "") -> str:
    return f"words:{role}{number:012x}"


def make(
    home: Home, number: int, *, promoted: bool = True, age: float = OLD, shared: Path | None = None
) -> None:
    """A run and the release that it made; both hold the same model, by a hard link."""
    run, release = home.runs("words") / f"run{number}", home.releases("words") / version(number)
    write(run / "task.json", {})
    write(run / "export" / "model.gguf", "m" * 1000)
    write(run / "release" / "summary.json", {"version": version(number)})
    registered = {
        "model": {"runtime": "ollama", "name": model(number)},
        "base": {"runtime": "ollama", "name": model(0, "base-")},
    }
    write(run / "register" / "registration.json", registered)
    write(release / "manifest.json", {"model": {"ollama": model(number)}})
    write(release / "gate.json", {"promoted": promoted})
    os.link(run / "export" / "model.gguf", release / "model.gguf")
    if shared:
        os.link(shared, run / "export" / "base.gguf")
    for path in (run / "task.json", run):
        os.utime(path, (age + number, age + number))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Six releases of old runs; the fifth is current, the fourth was not promoted."""
    home = Home(tmp_path)
    bases = [home.cache / "base-gguf" / f"{name}.gguf" for name in ("used", "unused")]
    for base in bases:
        write(base, "b" * 500)
    for number in range(1, 7):
        make(home, number, promoted=number != 4, shared=bases[0 if number > 1 else 1])
    write(home.releases("words") / "current", version(5))
    return home


def planned(home: Home, **policy: float) -> Plan:
    return plan(home, Policy(**{"releases": 1, **policy}), now=lambda: NOW)  # type: ignore[arg-type]


def names(found: Plan, kind: str) -> set[str]:
    return {item.path.name for item in found.items if item.kind == kind}


def test_the_current_release_the_one_before_and_the_newest_stay(home: Home) -> None:
    found = planned(home)
    assert names(found, "release") == {version(1), version(2), version(4)}
    assert names(found, "run") == {"run1", "run2", "run4"}
    assert names(found, "base model") == {"unused.gguf"}
    assert found.models == [model(1), model(2), model(4)]


def test_planning_changes_nothing_and_carrying_out_removes_just_that(home: Home) -> None:
    everything = sorted(home.root.rglob("*"))
    found = planned(home)
    assert sorted(home.root.rglob("*")) == everything
    removed: list[str] = []
    carry_out(found, home, removed.append)
    assert removed == found.models
    assert planned(home).items == []
    assert sorted(path.name for path in home.releases("words").iterdir()) == [
        version(3),
        version(5),
        version(6),
        "current",
    ]
    assert sorted(path.name for path in home.runs("words").glob("run*")) == ["run3", "run5", "run6"]
    assert not list(home.root.rglob("*.gone"))


def test_the_gain_counts_a_file_once_and_only_when_no_link_stays(home: Home) -> None:
    found = planned(home)
    others = sum(
        path.stat().st_size
        for item in found.items
        for path in item.path.rglob("*")
        if path.is_file() and path.suffix == ".json"
    )
    assert found.bytes == 3 * 1000 + 500 + others  # three models, the unused base; the used base stays


def test_lately_touched_runs_and_the_newest_run_stay(home: Home) -> None:
    os.utime(home.runs("words") / "run2", (NOW - DAY, NOW - DAY))
    assert names(planned(home), "run") == {"run1", "run4"}
    for release in home.releases("words").glob("2026*"):
        (release / "manifest.json").unlink()
    (home.releases("words") / "current").unlink()
    assert "run2" not in names(planned(home, releases=0), "run"), "the newest run of all"


def test_models_of_others_are_never_named(home: Home) -> None:
    foreign = {
        "model": {"runtime": "ollama", "name": "llama3:latest"},
        "base": {"runtime": "embedded", "name": model(9)},
    }
    write(home.runs("words") / "run1" / "register" / "registration.json", foreign)
    write(home.releases("words") / version(1) / "manifest.json", {"model": {"ollama": "mistral:7b"}})
    assert planned(home).models == [model(2), model(4)]


def test_a_base_that_a_kept_run_uses_stays_in_ollama(home: Home) -> None:
    assert model(0, "base-") not in planned(home).models


def test_models_tuned_by_dspy_stay_whatever_their_age(home: Home) -> None:
    """No release says that they are in use, and a program somewhere may ask them."""
    for number in (1, 2, 3):
        run = home.runs("student") / f"tuned{number}"
        write(run / "task.json", {"folder": None})
        if number > 1:  # the first was never finished
            registered = {"runtime": "ollama", "name": f"student:{number:012x}"}
            write(run / "register" / "registration.json", {"model": registered})
        os.utime(run / "task.json", (OLD, OLD + number))
        os.utime(run, (OLD, OLD + number))
    found = planned(home)
    assert names(found, "run") == {"run1", "run2", "run4", "tuned1"}
    assert not [name for name in found.models if name.startswith("student")]


def test_leftovers_of_killed_work_go_after_a_while(home: Home) -> None:
    for name, age in ((".old.partial", OLD), (".new.partial", NOW)):
        (home.releases("words") / name).mkdir()
        os.utime(home.releases("words") / name, (age, age))
    assert names(planned(home), "leftover") == {".old.partial"}


def test_nothing_goes_while_a_run_works_or_ollama_is_away(home: Home) -> None:
    found, everything = planned(home), sorted(home.root.rglob("*"))

    def away(_: str) -> None:
        raise RuntimeUnavailable("Ollama cannot be reached")

    with pytest.raises(RuntimeUnavailable):
        carry_out(found, home, away)
    with locked(home.runs("words"), "words"), pytest.raises(BusyError):
        carry_out(found, home, None)
    assert {path for path in home.root.rglob("*") if path.name != ".lock"} == set(everything)


def test_an_empty_home_has_nothing_to_prune(tmp_path: Path) -> None:
    assert planned(Home(tmp_path)) == Plan([], 0, [])
