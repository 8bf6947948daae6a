"""Data files: three formats give the same examples, and every bad row is listed."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.tasks import row
from trainer.data import Example, read
from trainer.errors import DataError


def write_csv(file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, ["text", "label"])
        writer.writeheader()
        writer.writerows(row(number) for number in range(3))


def write_parquet(file: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([row(number) for number in range(3)]), file)


@pytest.mark.parametrize(("name", "write"), [("a.csv", write_csv), ("a.parquet", write_parquet)])
def test_formats_agree(tmp_path: Path, name: str, write: object) -> None:
    assert callable(write)
    write(tmp_path / name)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(str(row(number)).replace("'", '"') for number in range(3)), encoding="utf-8")
    assert read({None: [tmp_path / name]}, ["text"], tmp_path) == read({None: [jsonl]}, ["text"], tmp_path)


def test_bad_rows_are_all_listed_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "fine"}\nnot json\n\n[1]\n{"label": "no input"}\n{"text": ""}\n', encoding="utf-8"
    )
    with pytest.raises(DataError) as caught:
        read({None: [file]}, ["text"], tmp_path)
    first, *rest = caught.value.faults
    assert first == "4 bad rows; mend or remove them (nothing was dropped):"
    assert [fault.split(": ")[0] for fault in rest] == [f"rows.jsonl:{line}" for line in (2, 4, 5, 6)]
    assert "write one JSON object a line" in rest[0]
    assert "no value for input text" in rest[2]


def test_ragged_csv_not_utf8_and_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nfine,even\nmuch,too,long\nshort\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError) as caught:
        read({None: sorted(tmp_path.iterdir())}, ["text"], tmp_path)
    text = str(caught.value)
    assert "a.csv:3" in text and "a.csv:4" in text
    assert "not UTF-8" in text and "not Parquet" in text


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("text,label,label", "columns of the same name: 'label'; give every column a name of its own"),
        ("text,,", "columns of the same name: ''; give every column a name of its own"),
        ("text, label,n", "columns named ' label'; take the spaces away from the name's ends"),
    ],
)
def test_a_csv_header_that_hides_cells_is_a_fault(tmp_path: Path, header: str, fault: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\nfine,even,odd\nother,odd,even\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read({None: [tmp_path / "a.csv"]}, ["text"], tmp_path)
    assert caught.value.faults[1:] == [f"a.csv:1: {fault}"]


def test_a_single_column_without_a_name_is_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text\n0,fine\n", encoding="utf-8")  # as pandas writes its index
    (example,) = read({None: [tmp_path / "a.csv"]}, ["text"], tmp_path)
    assert example.values["text"] == "fine"


def test_the_first_byte_that_is_not_utf8_is_found_in_a_long_file(tmp_path: Path) -> None:
    line = '{"text": "na\u00efve"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + 2000 * line + b'{"text": "\xe2\x82"}\n\xff\n')
    with pytest.raises(DataError) as caught:
        read({None: [tmp_path / "a.jsonl"]}, ["text"], tmp_path)
    at = 3 + 2000 * len(line) + 10
    assert caught.value.faults[1] == f"a.jsonl:2001: not UTF-8 at byte {at} of the file; save it as UTF-8"


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="hold no rows"):
        read({None: [tmp_path / "a.jsonl"]}, ["text"], tmp_path)


def test_identity_is_the_inputs_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "same", "label": "a"}\n{"text": "same", "label": "b"}\n', encoding="utf-8")
    first, second = read({"train": [file]}, ["text"], tmp_path)
    assert isinstance(first, Example)
    assert first.id == second.id
    assert first.split == "train"


def test_values_that_json_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    rows = [{"text": "fine", "when": None}, {"text": "late", "when": datetime(2026, 1, 1, tzinfo=UTC)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "cut \\ud83d"}\n{"text": NaN}\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read({None: sorted(tmp_path.iterdir())}, ["text"], tmp_path)
    assert [fault.split(": ")[0] for fault in caught.value.faults[1:]] == [
        "a.parquet:2",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
