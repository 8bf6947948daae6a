"""The pages under docs/ name what is there: links lead somewhere, quoted errors are errors of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
FIRST_CELL = re.compile(r"^\| (`.+?`) \|", re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_module_is_in_the_layout() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    layout = page.split("## Layout")[1].split("\nRules")[0]
    told = set(re.findall(r"\w+", layout))
    modules = [file for folder in ("trainer", "serve") for file in (ROOT / folder).rglob("*.py")]

    assert [file for file in modules if not file.stem.startswith("__") and file.stem not in told] == []


def test_every_quoted_error_is_one_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("trainer", "serve")
        for file in (ROOT / folder).rglob("*.py")
    )
    quoted = [cell.strip("`") for cell in FIRST_CELL.findall(page)]
    pieces = [piece.strip(" ;:.,") for text in quoted for piece in text.split("…")]

    assert len(quoted) > 20
    assert [piece for piece in pieces if len(piece) > 3 and piece not in sources] == []
