"""What a study has already been told: one JSON line an answer, on the disk before the next one is asked for."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.runs import read_jsonl

Row = dict[str, Any]


class Rows:
    """The lines of rows.jsonl, found by system and example.

    A line that a killed process left unfinished is cut off when the file is opened, so its question is
    asked again; every whole line is kept for good.

    Args:
        file: rows.jsonl; made with its folder when the first row comes.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: defaultdict[str, dict[str, Row]] = defaultdict(dict)
        if file.is_file():
            _cut_unfinished(file)
            for row in read_jsonl(file):
                self._found[row["system"]][row["example"]] = row

    def of(self, system: str) -> dict[str, Row]:
        """A system's rows by example."""
        return dict(self._found.get(system, {}))

    def add(self, row: Row) -> None:
        """Append a row; when this returns it survives a kill. It names its `system` and its `example`."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[row["system"]][row["example"]] = row


def _cut_unfinished(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
