"""The task's data: JSONL, CSV or Parquet rows. A bad row is listed with its file and line, never dropped."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError

MAX_FAULTS = 50

Row = tuple[int, dict[str, Any] | str]
"""Line (or row number) and the row; a string in place of the row is its fault."""


@dataclass(frozen=True)
class Example:
    """One row of the data. The id is the hash of its input fields."""

    id: str
    values: dict[str, Any]
    split: str | None = None
    """train, calibrate or test where the data came split."""


def read(files: Mapping[str | None, list[Path]], inputs: list[str], root: Path) -> list[Example]:
    """All rows of `files` (by split), in order. Faults name files relative to `root`.

    Raises:
        DataError: with every bad row's file, line and fault.
    """
    faults: list[str] = []
    found: list[Example] = []
    for split, paths in files.items():
        for path in paths:
            for line, row in _rows(path):
                fault = row if isinstance(row, str) else _row_fault(row, inputs)
                if isinstance(row, str) or fault:
                    faults.append(
                        f"{path.relative_to(root) if path.is_relative_to(root) else path}:{line}: {fault}"
                    )
                else:
                    found.append(Example(example_id(row, inputs), row, split))
    if faults:
        more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        count = f"{len(faults)} bad row{'s' if len(faults) > 1 else ''}; mend or remove them (nothing was dropped):"
        raise DataError([count, *faults[:MAX_FAULTS], *more])
    if not found:
        raise DataError(["the data files hold no rows; add examples, one a line"])
    return found


def example_id(values: Mapping[str, Any], inputs: list[str]) -> str:
    """Identity of an example: the hash of its input fields (16 hex digits)."""
    text = json.dumps([values[name] for name in inputs], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_fault(row: dict[str, Any], inputs: list[str]) -> str | None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return f"holds a value that JSON cannot ({error}); write text, numbers or lists of them"
    missing = [name for name in inputs if row.get(name) is None or row[name] == "" or row[name] != row[name]]
    if missing:
        return f"no value for input {', '.join(missing)}; the row has {', '.join(row) or 'no fields'}"
    return None


def _rows(file: Path) -> Iterator[Row]:
    """Rows with their line (or row number); a string in place of a row is its fault."""
    try:
        yield from READERS[file.suffix](file)
    except UnicodeDecodeError:
        yield _not_utf8(file.read_bytes())


def _not_utf8(data: bytes) -> Row:
    """Where the first byte is that is not UTF-8; a reader's own error counts within what it read last."""
    before = re.split("[\udc80-\udcff]", data.decode(errors="surrogateescape"), maxsplit=1)[0]
    where = f"not UTF-8 at byte {len(before.encode())}"
    return before.count("\n") + 1, f"{where} of the file; save it as UTF-8"


def _jsonl(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"not JSON: {error}; write one JSON object a line"
                continue
            yield (
                number,
                row
                if isinstance(row, dict)
                else f"a JSON {type(row).__name__}; write one JSON object a line",
            )


def _csv(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(lines, strict=True)
        try:
            if fault := _header_fault(reader.fieldnames or []):
                yield 1, fault
                return
            for row in reader:
                whole = None not in row and None not in row.values()
                yield (
                    reader.line_num,
                    row if whole else "not as many cells as the header; quote cells that hold commas",
                )
        except csv.Error as error:
            yield reader.line_num, f"not CSV: {error}; check the quotes"


def _header_fault(names: Sequence[str]) -> str | None:
    """Why cells could not be found by their column's name: of equal names the last would hide the others."""
    if equal := sorted({name for name in names if names.count(name) > 1}):
        return f"columns of the same name: {', '.join(map(repr, equal))}; give every column a name of its own"
    if padded := [name for name in names if name != name.strip()]:
        return f"columns named {', '.join(map(repr, padded))}; take the spaces away from the name's ends"
    return None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield 0, f"not Parquet: {error}; write it again"
        return
    yield from enumerate(rows, 1)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
