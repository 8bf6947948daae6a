"""What a bundle carries of a home and its tasks, and what it refuses to carry."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import release as releases
from tests.finished import finished_run
from trainer import release, task
from trainer.bundle import legal
from trainer.bundle.gather import Wanted, gather
from trainer.errors import BundleError
from trainer.runs import Home
from trainer.task import Task

NOW = "20261121T073000Z"
KEY = "abcdef-0123456789-of-ours"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with a base of its own, and a home with its release."""
    root = tmp_path_factory.mktemp("made")
    run = finished_run(root, train=6, calibrate=12, test=8, student={"base": "base"})
    release.run(run)
    run.store.close()
    (root / "words" / "base").mkdir()
    (root / "words" / "base" / "config.json").write_text("{}")
    return root


@pytest.fixture
def box(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "box")
    return tmp_path / "box"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of models with one of them, as Hugging Face's libraries lay it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--unsloth--Llama-3.2-1B-Instruct"
    blob = model / "blobs" / "b1"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    (snapshot / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    (snapshot / "pytorch_model.bin").write_text("pickle")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    yield tmp_path / "hub"


def _task(box: Path, **settings: Any) -> Task:
    import yaml

    if settings:
        file = box / "words" / "task.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **settings}))
    return task.load(box / "words")


def _gathered(box: Path, wanted: Wanted, environment: dict[str, str] | None = None) -> dict[str, bytes]:
    work = box.parent / "work"
    work.mkdir(exist_ok=True)
    found = gather(wanted, Home(box / "home"), environment or {}, work, NOW)
    contents = {}
    for source in found.sources:
        with source.open() as stream:
            contents[source.path] = stream.read()
    return contents


def test_a_task_its_release_its_traces_and_the_papers_travel(box: Path) -> None:
    (box / "words" / ".env").write_text("SECRET=1")
    (box / "words" / "__pycache__").mkdir()
    (box / "words" / "__pycache__" / "program.pyc").write_bytes(b"")
    current = releases.current(box / "home" / "releases" / "words")
    assert current is not None
    found = _gathered(box, Wanted([_task(box)]))
    prefix = f"releases/words/{current.version}/"
    assert {name.removeprefix(prefix) for name in found if name.startswith(prefix)} == {
        *current.manifest.files,
        "manifest.json",
        "gate.json",
    }
    assert {name for name in found if name.startswith("tasks/")} == {
        "tasks/words/task.yaml",
        "tasks/words/program.py",
        "tasks/words/data/rows.jsonl",
        "tasks/words/base/config.json",
    }
    assert "traces/words.jsonl.gz" in found
    assert {"README.txt", "tool.pyz", "legal/NOTICE.txt", "legal/LICENSE", "legal/third-party.txt"} <= set(
        found
    )
    components = {each["name"]: each for each in json.loads(found["legal/sbom.json"])["components"]}
    assert components["pydantic"]["licenses"][0]["license"]["name"] == "MIT"
    assert b"pydantic" in found["legal/third-party.txt"]


def test_what_is_not_wanted_stays(box: Path) -> None:
    found = _gathered(box, Wanted([_task(box)], releases=False, traces=False))
    assert {name.partition("/")[0] for name in found} == {"tasks", "legal", "README.txt", "tool.pyz"}


def test_a_base_from_the_hub_travels_with_its_licence_and_without_pickle(box: Path, hub: Path) -> None:
    chosen = _task(box, student={"base": "unsloth/Llama-3.2-1B-Instruct"})
    found = _gathered(box, Wanted([chosen], releases=False))
    prefix = f"bases/models--unsloth--Llama-3.2-1B-Instruct/{'0' * 40}/"
    assert {name for name in found if name.startswith("bases/")} == {
        f"{prefix}config.json",
        f"{prefix}LICENSE.txt",
    }
    notice = found["legal/NOTICE.txt"].decode()
    assert "Built with Llama" in notice
    assert "Llama 3.2 Community License" in notice
    assert "legal/models/unsloth--Llama-3.2-1B-Instruct/LICENSE.txt" in found


def test_everything_that_cannot_travel_is_named_at_once(box: Path, hub: Path) -> None:
    (box / "words" / "link.py").symlink_to(box / "words" / "program.py")
    (box / "words" / "notes.txt").write_text(f"key: {KEY}")
    (box / "words" / "pem.txt").write_text("-----BEGIN PRIVATE KEY-----")
    (box / "words" / "hub.txt").write_text(f"hf_{'Q7' * 17}")
    (box / "home" / "releases" / "words" / "current").unlink()
    chosen = _task(box, student={"base": "nobody/none"})
    with pytest.raises(BundleError) as refused:
        _gathered(box, Wanted([chosen]), {"PROVIDER_API_KEY": KEY})
    text = str(refused.value)
    for part in ("link.py is a link", "has no release", "nobody/none is not in the local cache"):
        assert part in text
    os.unlink(box / "words" / "link.py")
    with pytest.raises(BundleError) as refused:
        _gathered(box, Wanted([_task(box)], releases=False, bases=False), {"PROVIDER_API_KEY": KEY})
    assert "notes.txt holds the value of PROVIDER_API_KEY" in str(refused.value)
    assert "pem.txt holds what looks like a key (-----BEGIN…)" in str(refused.value)
    assert "hub.txt holds what looks like a key (hf_…)" in str(refused.value)  # and nothing of it
    assert KEY not in str(refused.value)


def test_keys_in_secret_files_are_known_too(box: Path) -> None:
    (box.parent / "secret").write_text(f"{KEY}\n")
    (box / "words" / "program.py").write_text((box / "words" / "program.py").read_text() + f"# {KEY}\n")
    with pytest.raises(BundleError, match="PROVIDER_API_KEY_FILE"):
        _gathered(
            box,
            Wanted([_task(box)], releases=False),
            {"PROVIDER_API_KEY_FILE": str(box.parent / "secret")},
        )


def test_data_and_bases_outside_of_the_task_are_refused(box: Path) -> None:
    shutil.copy(box / "words" / "data" / "rows.jsonl", box / "rows.jsonl")
    (box / "elsewhere").mkdir()
    chosen = _task(box, data="../rows.jsonl", student={"base": "../elsewhere"})
    with pytest.raises(BundleError) as refused:
        _gathered(box, Wanted([chosen], releases=False))
    assert len([fault for fault in refused.value.faults if "lies outside the task folder" in fault]) == 2


def test_a_damaged_release_does_not_travel(box: Path) -> None:
    next((box / "home" / "releases" / "words").glob("*/model.gguf")).write_text("x")
    with pytest.raises(BundleError, match="not the file that was released"):
        _gathered(box, Wanted([_task(box)]))


def test_an_image_is_saved_under_the_name_of_its_build(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "bin" / "docker"
    engine.parent.mkdir()
    engine.write_text(
        '#!/bin/sh\nif [ "$1" = save ]; then printf tar-of-$2; else echo sha256:0123456789abcdef 9; fi\n'
    )
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{engine.parent}:{os.environ['PATH']}")
    found = _gathered(box, Wanted([_task(box)], ["homestill/serve:0.1"], releases=False, traces=False))
    assert {name for name in found if name.startswith("box/")} >= {
        "box/compose.yaml",
        "box/docker/offline.yaml",
    }
    assert found["images/homestill-serve-0.1-0123456789ab.tar"] == b"tar-of-homestill/serve:0.1"
    engine.write_text("#!/bin/sh\necho No such image >&2\nexit 1\n")
    with pytest.raises(BundleError, match="No such image"):
        _gathered(box, Wanted([_task(box)], ["none"], releases=False))


def test_every_package_states_a_licence() -> None:
    silent = [each.metadata["Name"] for each in legal.distributions() if legal.licence(each) == "not stated"]
    assert len(legal.distributions()) > 20
    assert len(silent) < 5, silent
