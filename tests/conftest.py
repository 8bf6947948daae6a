"""What every test gets: an empty home, no keys, no network switches of the machine it runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.process import OFFLINE, QUIET

os.environ.setdefault("GOMP_SPINCOUNT", QUIET["GOMP_SPINCOUNT"])  # read once, when a test first imports torch


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has a HOMESTILL_HOME of its own and no provider keys."""
    for name in list(os.environ):
        if name.startswith(("HOMESTILL_", "OPENAI_", "OLLAMA_")) and not name.startswith("HOMESTILL_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOMESTILL_HOME", str(tmp_path / "home"))
    for name, value in {**OFFLINE, **QUIET}.items():
        monkeypatch.setenv(name, value)
    yield
