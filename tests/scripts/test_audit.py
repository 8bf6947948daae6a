"""scripts/audit: what it makes of pip-audit's answer."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AUDIT = runpy.run_path(str(ROOT / "scripts" / "audit"))
LOCK = Path("serve.txt")
MENDED = {"name": "fine", "version": "1.0", "vulns": []}
HOLED = {"name": "holed", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found on PyPI"}


def test_an_advisory_is_named_with_its_remedy() -> None:
    audit = AUDIT["read"]([MENDED, HOLED, UNKNOWN])

    assert AUDIT["said"](LOCK, audit) == "audit: serve.txt: holed 2.0: CVE-1, mended in 2.1"


def test_a_clean_lock_says_how_much_was_looked_up_and_what_was_not() -> None:
    audit = AUDIT["read"]([MENDED, UNKNOWN])

    assert AUDIT["said"](LOCK, audit) == "audit: serve.txt: nothing known of 1 packages; unknown there: ours"


def test_no_data_is_no_clean_bill() -> None:
    assert "skipped: the vulnerability data cannot be reached" in AUDIT["said"](
        LOCK, AUDIT["read"]([UNKNOWN])
    )


def test_a_lock_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit"), str(tmp_path / "none.txt")],
        capture_output=True,
        text=True,
    )

    assert "none.txt skipped: " in done.stdout
    assert len(done.stdout.splitlines()) == 1
