from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.records.journal import Journal
from tests.serve.records.journal_support import url


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(url(tmp_path))
    yield opened
    opened.close()
