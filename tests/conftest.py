"""What every test gets: an empty home, no keys, no network switches of the machine it runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from trainer.process import OFFLINE, QUIET

os.environ.setdefault("GOMP_SPINCOUNT", QUIET["GOMP_SPINCOUNT"])  # read once, when a test first imports torch

# how fast a machine is proves nothing, and a server that all examples share is made for them
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has a HOMESTILL_HOME of its own and no provider keys."""
    for name in list(os.environ):
        if name.startswith(("HOMESTILL_", "OPENAI_", "OLLAMA_")) and not name.startswith("HOMESTILL_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOMESTILL_HOME", str(tmp_path / "home"))
    for name, value in {**OFFLINE, **QUIET}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a task that is loaded adds its folder
    yield
