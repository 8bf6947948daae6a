from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve import journal_cli
from serve.errors import JournalError
from serve.records.entry import stamp
from serve.records.journal import Journal
from tests.serve.records.journal_support import entry, url

NOW = datetime.now(UTC)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    journal_cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["journal", *arguments])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    journal = Journal(url(tmp_path))
    journal.record(entry(1, created=stamp(NOW - timedelta(days=40)), key="alice"))
    journal.record(entry(2, created=stamp(NOW), key="bob", prompt_tokens=7, cost_usd=0.5, confidence=None))
    journal.record(entry(3, "mail", created=stamp(NOW), key="alice"))
    journal.close()
    return tmp_path


def left(home: Path) -> list[str]:
    journal = Journal(url(home))
    found = [each.id for each in journal.every()]
    journal.close()
    return found


def test_stats_are_by_day_task_and_reason(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_cli.run(parse("stats"), home) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("3 requests with 216 B of messages and answers, ")
    assert head.split()[:5] == ["day", "task", "endpoint", "route", "reason"]
    assert sorted(row.split()[1] for row in rows) == ["mail", "tickets"]
    tickets = next(row.split() for row in rows if row.split()[1] == "tickets")
    assert tickets[2:] == ["chat", "local", "confident", "1", "0", "7", "0", "0.5000", "12.5"]


def test_the_last_requests_are_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_cli.run(parse("list", "--limit", "2"), home) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["id", "req_3", "req_2"]
    assert journal_cli.run(parse("list", "--key", "alice", "--task", "tickets"), home) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split()[2:] == ["tickets", "alice", "200", "local", "confident", "0.900", "12.5"]
    assert journal_cli.run(parse("list", "--key", "nobody"), home) == 0
    assert capsys.readouterr().out == "no requests\n"


def test_one_request_is_shown_whole(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_cli.run(parse("show", "req_2"), home) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["messages"][0]["content"], shown["key"]) == ("req_2", "Größe 2", "bob")
    with pytest.raises(JournalError, match="no request req_9"):
        journal_cli.run(parse("show", "req_9"), home)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--older-than", "30d"], ["req_2", "req_3"]),
        (["--older-than", "6w"], ["req_1", "req_2", "req_3"]),
        (["--key", "alice"], ["req_2"]),
        (["--older-than", "1h", "--task", "tickets", "--key", "alice"], ["req_2", "req_3"]),
    ],
)
def test_delete_says_how_much_and_deletes(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], kept: list[str]
) -> None:
    assert journal_cli.run(parse("delete", *arguments, "--yes"), home) == 0
    said = capsys.readouterr().out
    count = 3 - len(kept)
    assert f"{count} requests deleted" in said if count else said == "nothing to delete\n"
    assert ("of messages and answers" in said) == bool(count)
    assert left(home) == kept


def test_delete_deletes_nothing_unasked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert journal_cli.run(parse("delete", "--key", "alice"), home) == 1  # no terminal to ask on
    said = capsys.readouterr().out
    assert said.startswith("2 requests with 144 B of messages and answers")
    assert "add --yes" in said
    with pytest.raises(JournalError, match="--older-than, --key or --task"):
        journal_cli.run(parse("delete", "--yes"), home)
    assert len(left(home)) == 3


def test_export_writes_a_line_a_request(home: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    target = home / "out.jsonl"
    assert journal_cli.run(parse("export", "--jsonl", str(target), "--key", "alice"), home) == 0
    assert capsysbinary.readouterr().out.startswith(b"2 requests written to ")
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["req_1", "req_3"]
    assert target.stat().st_mode & 0o777 == 0o600
    assert journal_cli.run(parse("export", "--jsonl", "-"), home) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 3
    with pytest.raises(JournalError, match="name another file"):
        journal_cli.run(parse("export", "--jsonl", str(home / "none" / "out.jsonl")), home)


def test_a_home_without_a_journal_is_said(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal in"):
        journal_cli.run(parse("stats"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["delete", "--older-than", "soon"], "'soon' is no age; use a number with h, d or w"),
        (["list", "--limit", "0"], "'0' is no count"),
        ([], "ACTION"),
    ],
)
def test_faults_in_the_arguments_name_value_and_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert said in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "journal delete --older-than 30d" in capsys.readouterr().out
