"""scripts/demo, as a person starts it: the whole loop on the small model, with the figures it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import release as releases
from serve.release import Release

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def demo(home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOMESTILL_HOME": str(home), "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "examples" / "tickets" / "demo.py")]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1400)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(home: Path) -> subprocess.CompletedProcess[str]:
    return demo(home)


@pytest.fixture(scope="module")
def release(home: Path, first: subprocess.CompletedProcess[str]) -> Release:
    assert first.returncode == 0, first.stdout + first.stderr
    found = releases.current(home / "releases" / "tickets")
    assert found is not None
    return found


def test_the_scores_are_as_promised(release: Release) -> None:
    scores = release.manifest.scores
    assert scores["teacher"].n >= 300
    assert (
        scores["teacher"].mean is not None
        and scores["student"].mean is not None
        and scores["base"].mean is not None
    )
    assert scores["base"].mean <= 0.5 * scores["teacher"].mean
    assert scores["student"].mean >= 0.85 * scores["teacher"].mean


def test_the_threshold_is_certified_and_most_is_answered_locally(release: Release) -> None:
    router = release.manifest.router
    assert (router.certified, router.keep, router.confidence) == (True, 0.95, 0.95)
    assert router.local_share is not None and router.local_share >= 0.6


def test_the_model_is_served_as_it_was_trained(release: Release) -> None:
    assert release.manifest.parity.prompt_tokens_equal
    assert release.manifest.teacher.stand_in is True


def test_the_endpoint_says_who_answered(first: subprocess.CompletedProcess[str]) -> None:
    clear, strange = first.stdout.split("a ticket that fits no label:")
    assert "answered by local (confident" in clear
    assert "answered by teacher (low_confidence" in strange
    assert "stand-in" in first.stdout
    assert "report.html" in first.stdout


def test_a_second_run_does_nothing_again(home: Path, release: Release) -> None:
    again = demo(home)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do: every stage is up to date" in again.stdout
    assert [found.name for found in (home / "releases" / "tickets").iterdir() if found.is_dir()] == [
        release.version
    ]
