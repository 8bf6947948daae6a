"""Images are built once a session; without an engine and a base image the tests skip and say why."""

from __future__ import annotations

import pytest

from tests.docker import engine


@pytest.fixture(scope="session")
def images() -> None:
    """homestill/serve:test, homestill/trainer:test and the stand-ins, as the tree is now."""
    reason = engine.missing()
    if reason:
        pytest.skip(reason)
    engine.build_all()
