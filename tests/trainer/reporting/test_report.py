"""The report says everything that it should, honestly, and refers to nothing outside itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.manifest import Manifest
from tests.finished import finished_run, opened
from trainer.reporting import report
from trainer.reporting.manifest import manifest as make_manifest
from trainer.runs import Run, read_json, write_json

SHA = "sha256:" + "0" * 64
HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script> {{ 7 * 7 }} & "quoted"'
SECTIONS = [
    "Score",
    "Worth it?",
    "Routing",
    "Examples",
    "Latency and cost",
    "Training",
    "Data",
    "Parity",
    "Settings, hashes and versions",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    hostile = {number: f"{HOSTILE} {number}" for number in range(2000, 2040)}
    run = finished_run(root, quality={"keep": 0.8, "confidence": 0.9}, texts=hostile)
    run.store.close()
    return root


@pytest.fixture
def here(original: Path, tmp_path: Path) -> Iterator[Run]:
    shutil.copytree(original, tmp_path / "copy")
    run = opened(tmp_path / "copy")
    yield run
    run.store.close()


def manifest_of(run: Run) -> Manifest:
    return make_manifest(run, "20261120T221500Z-00000000", {"model.gguf": SHA})


def page(run: Run, *reasons: str) -> str:
    return report.render(run, manifest_of(run), reasons)


def test_every_section_and_chart_is_there(here: Run) -> None:
    text = page(here)
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    labels = re.findall(r'aria-label="(\w+)', text)
    assert labels == ["Risk", "Reliability", "Training"]
    assert "certified threshold" in text
    assert "kept: step 60" in text
    assert "dropped: exact duplicate" in text
    assert "mean log-probability" in text
    assert SHA in text


def test_a_certified_release_says_what_is_promised(here: Run) -> None:
    share = int(100 * read_json(here.stage("certify") / "summary.json")["hybrid"]["local_share"])
    assert share > 0
    promise = f"{share} % of requests are answered locally, with at least 80 % of the teacher's score at 90 %"
    assert promise in page(here).replace("&#39;", "'")


def test_the_stand_in_is_named_in_the_first_line(here: Run) -> None:
    body = page(here).split("<body>")[1]
    assert (
        body.strip()
        .splitlines()[0]
        .startswith('<p class="notice" role="note"><strong>The teacher is a stand-in')
    )


def test_a_real_teacher_is_not_called_a_stand_in(here: Run) -> None:
    manifest = manifest_of(here)
    teacher = manifest.teacher.model_copy(update={"stand_in": False})
    text = report.render(here, manifest.model_copy(update={"teacher": teacher}), [])
    assert "is a stand-in" not in text


def test_it_refers_to_nothing_outside_itself(here: Run) -> None:
    text = page(here)
    tags = "".join(re.findall(r"<[^>]*>", text))
    assert not re.search(r"https?:|//|url\((?!#)|@import|\bsrc=", tags)
    assert not re.search(r"url\((?!#)|@import", text.split("</style>")[0])
    assert "xmlns" not in text
    links = re.findall(r'href="([^"]*)"', text)
    assert links
    assert all(link.startswith("#") for link in links)


def test_hostile_text_is_shown_and_not_run(here: Run) -> None:
    text = page(here)
    assert "&lt;script src=&#34;https://evil.example/x.js&#34;&gt;" in text
    assert "<script" not in text
    assert "{{ 7 * 7 }}" in text


def test_reasons_of_the_gate_are_shown(here: Run) -> None:
    text = page(here, "worse than <before>")
    assert "This release was not promoted." in text
    assert "worse than &lt;before&gt;" in text
    assert "This release was not promoted." not in page(here)


def test_pictures_take_their_colours_from_the_page(here: Run) -> None:
    text = page(here)
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", pictures)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    style = text.split("</style>")[0]
    dark = style.split("prefers-color-scheme: dark")[1]
    assert all(f"{name}:" in style for name in used)
    assert all(f"{name}:" in dark for name in used - {"--c"})


def test_ids_in_the_page_are_unique(here: Run) -> None:
    clips = re.findall(r'<clipPath id="([^"]+)"', page(here))
    assert len(clips) == len(set(clips)) > 0


def test_the_same_run_gives_the_same_page(here: Run) -> None:
    assert page(here) == page(here)


def refused(run: Run, reason: str, missing: int | None) -> Run:
    summary = read_json(run.stage("certify") / "summary.json")
    summary["certificate"] |= {
        "certified": False,
        "threshold": None,
        "reason": reason,
        "rows_missing": missing,
        "examples_missing": missing and round(missing / 0.6),
    }
    teacher = read_json(run.stage("evaluate") / "summary.json")["teacher"]["cost_per_1k_usd"]
    summary["hybrid"] |= {"local_share": 0.0, "risk": 0.0, "cost_per_1k_usd": teacher}
    write_json(run.stage("certify") / "summary.json", summary)
    router = read_json(run.stage("certify") / "router.json")
    write_json(run.stage("certify") / "router.json", router | {"certified": False, "threshold": None})
    return run


def test_a_refusal_names_the_rows_missing(here: Run) -> None:
    text = page(refused(here, "60 calibration rows do not prove it", 1240))
    assert "Nothing is answered locally yet: about 2,067 more examples in the calibrate split" in text
    assert "1,240" not in text
    assert "60 calibration rows do not prove it" in text
    assert "No answer is kept." in text
    assert "no API cost is saved" in text


def test_a_program_that_could_not_be_measured_still_has_a_report(here: Run) -> None:
    refused(here, "the program has 2 predictors", None)
    summary = read_json(here.stage("certify") / "summary.json")
    few = {key: summary[key] for key in ("certificate", "fit", "hybrid")}
    write_json(here.stage("certify") / "summary.json", few)
    router = read_json(here.stage("certify") / "router.json")
    write_json(here.stage("certify") / "router.json", router | {"model": None, "neighbours": None})
    text = page(here)
    assert "no threshold could be certified" in text
    assert "the program has 2 predictors" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS


def test_a_teacher_that_never_scores_still_has_a_report(here: Run) -> None:
    evaluated = read_json(here.stage("evaluate") / "summary.json")
    evaluated["teacher"] |= {"mean": 0.0, "low": 0.0, "high": 0.1}
    evaluated["retention"] = {
        "percent": None,
        "low": None,
        "high": None,
        "floor": None,
        "next_step": "mend it",
    }
    write_json(here.stage("evaluate") / "summary.json", evaluated)
    summary = read_json(here.stage("certify") / "summary.json")
    summary["hybrid"]["retention"] = None
    write_json(here.stage("certify") / "summary.json", summary)
    assert "the teacher never scores" in page(here)
