"""docs/configuration.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"
INTERNAL = {"HOMESTILL_TEST_DATA", "HOMESTILL_FUZZ"}  # of the tests


def test_the_page_is_what_the_code_says() -> None:
    found = subprocess.run(
        [sys.executable, "scripts/reference", "--check"], cwd=ROOT, capture_output=True, text=True
    )

    assert found.returncode == 0, found.stderr


def test_it_names_every_variable_that_the_code_reads() -> None:
    files = [file for folder in ("trainer", "serve", "docker") for file in (ROOT / folder).rglob("*")]
    files += [ROOT / "compose.yaml", ROOT / "scripts" / "install"]
    sources = "\n".join(
        file.read_text(encoding="utf-8")
        for file in files
        if file.suffix in (".py", ".yaml", "") and file.is_file()
    )

    read = set(re.findall(r"\bHOMESTILL_[A-Z_]+\b", sources)) - INTERNAL

    assert len(read) > 10
    assert sorted(name for name in read if name not in PAGE.read_text(encoding="utf-8")) == []
