from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.errors import SettingsError
from serve.guard.keys import ANONYMOUS, Caller, Keys, add, read, revoke


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def new(path: Path, name: str = "alice") -> str:
    return add(path, name, tasks=["tickets"], egress="redact", daily_usd=5.0)


def test_without_keys_everybody_is_let_in_and_with_one_nobody_else(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    keys = Keys((), path, clock)
    assert (keys.who(None), keys.required) == (ANONYMOUS, False)
    key = new(path)
    clock.now = 2.0
    assert keys.required
    assert (
        keys.who(f"Bearer {key}")
        == keys.who(f"bearer  {key} ")
        == Caller("alice", frozenset({"tickets"}), "redact", 5.0)
    )
    for given in (None, "", key, f"Basic {key}", f"Bearer {key}x", "Bearer ", "Bearer ä"):
        assert keys.who(given) is None


def test_keys_of_the_environment_may_ask_everything(tmp_path: Path) -> None:
    keys = Keys(("one", "two"), tmp_path / "keys.json")
    assert (keys.who("Bearer two"), keys.who("Bearer three")) == (Caller("env-2"), None)


def test_a_revoked_key_is_out_without_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    key = new(path)
    new(path, "bob")
    keys = Keys((), path, clock)
    assert keys.who(f"Bearer {key}")
    revoke(path, "alice")
    assert keys.who(f"Bearer {key}")  # it looks once a second
    clock.now = 1.5
    assert keys.who(f"Bearer {key}") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema": 2, "keys": []}', '{"schema": 1, "keys": [{"name": "x"}]}']
)
def test_a_broken_file_lets_nobody_in(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    keys = Keys(("given",), path)
    assert (keys.who("Bearer given"), keys.required) == (None, True)
    assert "restore it" in keys.problem


def test_revoking_the_last_key_does_not_open_the_door(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    key = new(path)
    keys = Keys((), path, clock)
    assert keys.required
    assert revoke(path, "alice") == 0
    for clock.now in (2.0, 4.0):
        assert (keys.who(f"Bearer {key}"), keys.who(None), keys.required) == (None, None, True)
        path.unlink(missing_ok=True)  # nor does removing the file


def test_a_fault_that_is_over_is_forgotten_though_the_file_is_as_before(tmp_path: Path) -> None:
    path, aside, clock = tmp_path / "keys.json", tmp_path / "aside", Clock()
    key = new(path)
    keys = Keys((), path, clock)
    assert keys.who(f"Bearer {key}")
    path.rename(aside)
    path.write_text("broken")
    clock.now = 2.0
    assert keys.who(f"Bearer {key}") is None
    aside.replace(path)
    clock.now = 4.0
    assert keys.who(f"Bearer {key}")
    assert keys.problem == ""


def test_a_place_that_cannot_be_looked_at_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keys = Keys((), tmp_path / "file" / "keys.json")
    assert (keys.who(None), keys.required) == (None, True)
    assert "give the server access" in keys.problem


def test_nothing_is_lost_when_several_change_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new(path, "gone")
    names = [f"key-{number}" for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(new, path, name) for name in names]
        pool.submit(revoke, path, "gone").result()
        assert len({each.result() for each in made}) == len(names)
    assert sorted(entry.name for entry in read(path).keys) == sorted(names)


def test_only_the_hash_is_kept_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = new(path)
    text = path.read_text()
    assert key not in text
    assert key.removeprefix("hs-") not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(text)["keys"][0]["name"] == "alice"


def test_names_are_unique_and_values_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new(path)
    with pytest.raises(SettingsError, match='a key named "alice" already'):
        new(path)
    with pytest.raises(SettingsError, match="name is 'a b'"):
        new(path, "a b")
    with pytest.raises(SettingsError, match="daily_usd"):
        add(path, "bob", tasks=None, egress="allow", daily_usd=-1)
    for taken in ("env-1", "anonymous"):
        with pytest.raises(SettingsError, match="others are called by"):
            new(path, taken)
    with pytest.raises(SettingsError, match='no key named "bob"; there is alice'):
        revoke(path, "bob")
    assert [entry.name for entry in read(path).keys] == ["alice"]
