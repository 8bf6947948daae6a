"""A release carries every file that its program can import, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import ReleaseError
from trainer.sources import sources


def found(folder: Path, files: dict[str, str], *starts: str) -> set[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    paths = sources(folder, [folder / start for start in starts or ("program.py",)])
    assert paths == sorted(paths)
    return {path.relative_to(folder).as_posix() for path in paths}


@pytest.mark.parametrize(
    ("program", "needed"),
    [
        ("import a", {"a.py"}),
        ("from a import something", {"a.py"}),
        ("import p.q", {"p/__init__.py", "p/q.py"}),
        ("from p import q", {"p/__init__.py", "p/q.py"}),
        ("from p.q import something", {"p/__init__.py", "p/q.py"}),
        ("from p import *", {"p/__init__.py"}),
        ("import p.relative", {"p/__init__.py", "p/relative.py", "p/q.py", "a.py"}),
        ("from space import b", {"space/b.py"}),
        ("def forward():\n    import a", {"a.py"}),
        ("try:\n    import a\nexcept ImportError:\n    a = None", {"a.py"}),
        ("import chain", {"chain.py", "a.py"}),
        ("import circle", {"circle.py"}),
        ("import json, dspy, nobody", set()),
        ("from . import a", {"a.py"}),
    ],
)
def test_imports_are_followed(tmp_path: Path, program: str, needed: set[str]) -> None:
    files = {
        "program.py": program,
        "a.py": "",
        "p/__init__.py": "",
        "p/q.py": "",
        "p/relative.py": "from . import q\nimport a",
        "space/b.py": "",
        "chain.py": "import a",
        "circle.py": "import program",
        "json.py": "",
        "unused.py": "",
    }
    assert found(tmp_path, files) == {"program.py"} | needed


def test_every_start_is_there_once(tmp_path: Path) -> None:
    files = {"program.py": "import shared", "metric.py": "import shared", "shared.py": ""}
    names = found(tmp_path, files, "program.py", "./metric.py", "metric.py")
    assert names == {"program.py", "metric.py", "shared.py"}


def test_a_module_that_is_no_python_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"broken\.py is no Python .*mend it"):
        found(tmp_path, {"program.py": "import broken", "broken.py": "def"})


def test_a_link_that_leads_out_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "helper.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(ReleaseError, match=r"helper\.py lies outside the task folder"):
        found(tmp_path / "task", {"program.py": "import helper"})
