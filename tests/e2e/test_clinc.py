"""Real queries through capture and curation; the whole benchmark is scripts/bench/clinc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(600)]


@pytest.fixture
def data() -> Path:
    """Folder with `clinc150/`, named by HOMESTILL_TEST_DATA."""
    given = os.environ.get("HOMESTILL_TEST_DATA")
    folder = Path(given or "") / "clinc150"
    if not given or not folder.is_dir():
        pytest.skip("HOMESTILL_TEST_DATA names no folder that holds clinc150")
    return folder


def test_real_queries_are_captured_and_curated(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "clinc"), str(data), "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, "--train", "300", "--until", "curate"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    (summary,) = tmp_path.glob("runs/clinc/*/curate/summary.json")
    assert '"near-duplicate"' in summary.read_text("utf-8")
    assert len((summary.parent / "test.jsonl").read_text("utf-8").splitlines()) > 1400
