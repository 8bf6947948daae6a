"""General data is read by one rule, for replay as for the forgetting study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_run import tiny_run
from trainer import prepare
from trainer.errors import DataError
from trainer.training import chats

GOOD = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "It is 1."}]


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "general.jsonl"
    lines = [json.dumps({"messages": GOOD}), "", json.dumps({"question": "Say 1.", "answer": "It is 1."}), ""]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    assert chats.read(file) == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("not json", "not JSON"),
        ("[]", "a JSON list"),
        ('{"text": "a"}', "no conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "does not end with an assistant's answer"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}',
            "no conver",
        ),
        ('{"question": "a", "answer": " "}', "does not end with an assistant's answer"),
        (
            json.dumps({"messages": [{"role": "tool", "content": "a"}, *GOOD]}),
            "a message's role is 'tool'; use system, user, assistant",
        ),
    ],
)
def test_lines_that_are_no_conversations_are_named(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text(f"{json.dumps({'messages': GOOD})}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"1 bad row in .*; mend or remove them:\ngeneral.jsonl:2: {fault}"):
        chats.read(file)


def test_what_is_no_utf_8_is_the_files_fault_and_not_the_bases(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    settings = run.task.folder / "task.yaml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(
        text.replace("epochs: 1", "replay: {data: general.jsonl}, epochs: 1"), encoding="utf-8"
    )
    (run.task.folder / "general.jsonl").write_text('{"question": "Fällt", "answer": "a"}', encoding="latin-1")
    with pytest.raises(
        DataError, match=r"general.jsonl cannot be read: .*; name a file of JSON lines in UTF-8"
    ):
        prepare.choose(tiny_run(tmp_path), {})
