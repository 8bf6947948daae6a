from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.guard.keys import Caller, Keys
from serve.keys_cli import add_parser, run


def keys(home: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command"))
    return run(parser.parse_args(["keys", *words]), home)


def test_a_key_is_shown_once_and_lets_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "new"
    words = ("--task", "tickets", "--task", "mails", "--egress", "redact", "--daily-usd", "5")
    assert keys(home, "add", "batch", *words) == 0
    assert home.stat().st_mode & 0o077 == 0
    said = capsys.readouterr()
    key = said.out.strip()
    caller = Keys((), home / "keys.json").who(f"Bearer {key}")
    assert caller == Caller("batch", frozenset({"tickets", "mails"}), "redact", 5.0)
    assert "only time" in said.err  # beside the key, so that the key can be piped

    assert keys(home, "list") == 0
    listed = capsys.readouterr().out
    assert key not in listed
    for part in ("batch", "tickets, mails", "egress redact", "$5 a day"):
        assert part in listed


def test_a_key_without_limits_is_listed_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys(tmp_path, "add", "alice")
    capsys.readouterr()
    keys(tmp_path, "list")
    listed = capsys.readouterr().out
    assert "all tasks" in listed
    assert "no cap" in listed


def test_a_revoked_key_is_out_and_the_last_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys(tmp_path, "add", "alice")
    keys(tmp_path, "add", "bob")
    keys(tmp_path, "revoke", "alice")
    assert "last stored key" not in capsys.readouterr().err
    keys(tmp_path, "revoke", "bob")
    assert "last stored key" in capsys.readouterr().err
    assert not Keys((), tmp_path / "keys.json").required


def test_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='no key named "alice"; there is none'):
        keys(tmp_path, "revoke", "alice")
    with pytest.raises(SettingsError, match="daily_usd"):
        keys(tmp_path, "add", "alice", "--daily-usd", "nan")


def test_help_gives_examples(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        keys(tmp_path, "--help")
    assert "python -m serve keys revoke alice" in capsys.readouterr().out
