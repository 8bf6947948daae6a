from __future__ import annotations

from pathlib import Path

import pytest

from trainer.bundle import keys


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key."""
    path = tmp_path_factory.mktemp("keys") / "box.key"
    keys.make_if_missing(path)
    return path


@pytest.fixture(scope="session")
def trusted(key: Path) -> bytes:
    """Its public half."""
    return keys.public(key)
