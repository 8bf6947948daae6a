"""A release is loaded whole and as it was signed off, or refused with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve import release
from serve.manifest import Manifest, RouterFile
from serve.release import ReleaseInvalid

VERSION_TIME = "20261120T221500Z"
SHA = "0" * 64
LISTED = [
    "model.gguf",
    "router.json",
    "neighbours.npz",
    "program.json",
    "task.yaml",
    "program.py",
    "report.html",
]


def router(model: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": "tickets",
        "binds": {
            "model": model,
            "quantization": "q8_0",
            "template": SHA,
            "program": SHA,
            "adapter": "chat",
            "runtime": "embedded",
        },
        "threshold": 0.81,
        "certified": True,
        "keep": 0.95,
        "confidence": 0.95,
        "reason": "",
        "predictors": [
            {
                "name": "predict",
                "fingerprint": SHA,
                "prefix": "[[ ## text ## ]]\n",
                "suffix": "",
                "fields": [{"name": "category", "labels": ["billing", "bug"]}, {"name": "summary"}],
            }
        ],
        "sampling": {"temperature": 0.0, "max_tokens": 512, "context": 2048},
        "model": {
            "features": ["min_logprob"],
            "mean": [0.0],
            "scale": [1.0],
            "weights": [2.0],
            "bias": 0.5,
            "calibration": {"kind": "sigmoid", "a": 1.0, "b": 0.0},
        },
        "neighbours": "neighbours.npz",
    }


def manifest(files: dict[str, str]) -> dict[str, Any]:
    model = files["model.gguf"].removeprefix("sha256:")
    score = {"mean": 0.9, "low": 0.87, "high": 0.93, "n": 400, "failures": 2}
    return {
        "schema": 1,
        "task": "tickets",
        "version": f"{VERSION_TIME}-{release.content_hash(files)}",
        "base": {"name": "tiny", "sha256": SHA},
        "method": "lora",
        "data": {"train": 600, "calibrate": 400, "test": 400, "sha256": SHA},
        "teacher": {"model": "openai/gpt-4o", "stand_in": False},
        "model": {"file": "model.gguf", "sha256": model, "quantization": "q8_0", "ollama": None},
        "parity": {"prompt_tokens_equal": True, "answers_equal": 0.99, "metric_delta": -0.002},
        "scores": {"teacher": score, "base": score, "student": score, "hybrid": score},
        "router": {
            "threshold": 0.81,
            "certified": True,
            "keep": 0.95,
            "confidence": 0.95,
            "local_share": 0.86,
        },
        "latency_ms": {"teacher": {"p50": 300, "p95": 900}, "local": {"p50": 40, "p95": 70}},
        "cost_per_1k_usd": {"teacher": 2.5, "hybrid": 0.35},
        "software": {"homestill": "0.1.0"},
        "seed": 0,
        "files": files,
    }


def build(releases: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """A valid release; `change` edits its manifest before it is written."""
    draft = releases / "draft"
    draft.mkdir(parents=True)
    for name in LISTED:
        (draft / name).write_text(f"content of {name}")
    model = release.file_digest(draft / "model.gguf").removeprefix("sha256:")
    (draft / "router.json").write_text(json.dumps(router(model)))
    value = manifest({name: release.file_digest(draft / name) for name in LISTED})
    folder = releases / str(value["version"])
    change(value)
    (draft / "manifest.json").write_text(json.dumps(value))
    draft.rename(folder)
    return folder


def faults_of(folder: Path) -> list[str]:
    with pytest.raises(ReleaseInvalid) as refused:
        release.load(folder)
    return refused.value.faults


def test_a_release_is_loaded_with_its_paths(tmp_path: Path) -> None:
    folder = build(tmp_path)
    loaded = release.load(folder)
    assert loaded.model == folder / "model.gguf"
    assert loaded.neighbours == folder / "neighbours.npz"
    assert loaded.interface is None  # as in every release from before there was one
    assert loaded.manifest.scores["student"].mean == 0.9
    assert loaded.router.binds.runtime == "embedded"
    assert loaded.router.model is not None
    assert loaded.router.model.features == ["min_logprob"]


def test_the_written_manifest_reads_back_equal(tmp_path: Path) -> None:
    loaded = release.load(build(tmp_path)).manifest
    assert Manifest.model_validate_json(loaded.text()) == loaded
    assert json.loads(loaded.text())["schema"] == 1


@pytest.mark.parametrize("name", LISTED)
def test_an_altered_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert [str(folder / name) in fault and "SHA-256" in fault for fault in faults_of(folder)] == [True]


@pytest.mark.parametrize("name", [*LISTED, "manifest.json"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path)
    (folder / name).unlink()
    assert f"{folder / name} is missing" in faults_of(folder)[0]


def test_an_extra_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "code").mkdir()
    (folder / "code" / "extra.py").write_text("")
    assert f"{folder / 'code' / 'extra.py'} is not in the manifest" in faults_of(folder)[0]


def test_the_gates_verdict_may_lie_beside_the_manifest(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "gate.json").write_text("{}")
    assert release.load(folder).version == folder.name


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "model.gguf").write_text("other")
    (folder / "program.json").unlink()
    assert len(faults_of(folder)) == 2


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda value: value.update(schema=2), "has schema 2, this version reads 1"),
        (lambda value: value.pop("scores"), "scores: Field required"),
        (lambda value: value["files"].update({"../x": f"sha256:{SHA}"}), "leaves the release"),
        (lambda value: value["files"].update({"/etc/hosts": f"sha256:{SHA}"}), "leaves the release"),
        (lambda value: value.update(task="other"), "task of router.json is tickets"),
        (lambda value: value["model"].update(sha256=SHA), "model that router.json binds is"),
        (
            lambda value: value["model"].update(quantization="f16"),
            "quantization that router.json binds is q8_0",
        ),
        (lambda value: value["router"].update(threshold=0.5), "threshold of router.json is 0.81"),
        (lambda value: value["router"].update(certified=False), "certified of router.json is True"),
        (lambda value: value.update(version=f"{VERSION_TIME}-00000000"), "content of the files is"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], part: str
) -> None:
    assert any(part in fault for fault in faults_of(build(tmp_path, change)))


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json" in faults_of(folder)[0]


def test_a_renamed_release_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    other = folder.rename(tmp_path / f"{VERSION_TIME}-00000000")
    assert any("name of the folder" in fault for fault in faults_of(other))


def test_an_uncertified_router_needs_no_model() -> None:
    value = router(SHA) | {"threshold": None, "certified": False, "model": None, "neighbours": None}
    assert RouterFile.model_validate(value).threshold is None


def test_a_certificate_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="certified is true without a threshold"):
        RouterFile.model_validate(router(SHA) | {"threshold": None})


def test_weights_of_different_length_are_refused() -> None:
    value = router(SHA)
    value["model"]["weights"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="differ in length"):
        RouterFile.model_validate(value)


def test_what_runs_is_compared_with_what_was_certified() -> None:
    bound = RouterFile.model_validate(router(SHA))
    assert bound.mismatches(runtime="embedded", program=SHA) == []
    assert 'binds runtime "embedded", "ollama" is in use' in bound.mismatches(runtime="ollama")[0]


def test_current_is_none_before_the_first_release(tmp_path: Path) -> None:
    assert release.current(tmp_path / "none") is None
    assert release.versions(tmp_path / "none") == []


def test_current_names_the_release_in_use(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (tmp_path / "current").write_text(folder.name + "\n")
    found = release.current(tmp_path)
    assert found is not None
    assert found.folder == folder


@pytest.mark.parametrize("text", ["../../etc", "", "latest", f"{VERSION_TIME}-zzzzzzzz"])
def test_current_that_is_no_version_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "current").write_text(text)
    with pytest.raises(ReleaseInvalid, match="no version"):
        release.current(tmp_path)


def test_current_that_names_a_missing_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "current").write_text(f"{VERSION_TIME}-00000000")
    with pytest.raises(ReleaseInvalid, match=r"manifest\.json is missing"):
        release.current(tmp_path)


def test_versions_are_sorted_and_leave_out_what_is_half_written(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (tmp_path / f".{folder.name}.partial").mkdir()
    older = tmp_path / "20250101T000000Z-00000000"
    older.mkdir()
    assert release.versions(tmp_path) == [folder.name]
    (older / "manifest.json").write_text("{}")
    assert release.versions(tmp_path) == [older.name, folder.name]


def test_the_report_does_not_change_the_content() -> None:
    files = {"model.gguf": f"sha256:{SHA}", "report.html": f"sha256:{SHA}"}
    assert release.content_hash(files) == release.content_hash(files | {"report.html": "sha256:" + "1" * 64})
    assert release.content_hash(files) != release.content_hash(files | {"model.gguf": "sha256:" + "1" * 64})
