"""Any changed, missing or extra byte of a bundle is refused, and the file is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.bundle.samples import FILES, write_bundle
from trainer.bundle import keys
from trainer.bundle.contents import BACKUP, BUNDLE, CHECKSUMS, EXPORT, SIGNATURE
from trainer.bundle.verify import check, chunks, trusted_key
from trainer.errors import BundleError

ROUNDS = 200


@pytest.fixture
def bundle(tmp_path: Path, key: Path) -> Path:
    folder = tmp_path / "bundle"
    write_bundle(folder, key)
    return folder


def test_a_bundle_as_it_was_written_is_accepted(bundle: Path, trusted: bytes) -> None:
    contents = check(bundle, BUNDLE, trusted)
    assert {file.path: b"".join(chunks(bundle, file)) for file in contents.files} == FILES
    assert max(part.bytes for part in contents.parts()) == 1000


def test_200_changes_are_all_refused_by_name(bundle: Path, trusted: bytes) -> None:
    source = random.Random(20261121)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    for _ in range(ROUNDS):
        change = source.choice([_flip, _truncate, _lengthen, _swap, _remove, _add])
        before = {path: path.read_bytes() for path in files}
        named = change(bundle, files, source)
        with pytest.raises(BundleError) as refused:
            check(bundle, BUNDLE, trusted)
        for path in named:
            assert path.relative_to(bundle).as_posix() in str(refused.value), change.__name__
        for path in {*named, *files}:
            path.unlink(missing_ok=True)
        for path, data in before.items():
            path.write_bytes(data)
    check(bundle, BUNDLE, trusted)


def _flip(_: Path, files: list[Path], source: random.Random) -> list[Path]:
    path = source.choice([each for each in files if each.stat().st_size])
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(data)
    return [path]


def _truncate(_: Path, files: list[Path], source: random.Random) -> list[Path]:
    path = source.choice([each for each in files if each.stat().st_size])
    os.truncate(path, source.randrange(path.stat().st_size))
    return [path]


def _lengthen(_: Path, files: list[Path], source: random.Random) -> list[Path]:
    path = source.choice(files)
    path.write_bytes(path.read_bytes() + source.randbytes(source.randint(1, 9)))
    return [path]


def _swap(_: Path, files: list[Path], source: random.Random) -> list[Path]:
    parts = [each for each in files if each.name not in (CHECKSUMS, SIGNATURE)]
    while True:
        one, other = source.sample(parts, 2)
        first, second = one.read_bytes(), other.read_bytes()
        if first != second:
            one.write_bytes(second)
            other.write_bytes(first)
            return [one, other]


def _remove(_: Path, files: list[Path], source: random.Random) -> list[Path]:
    path = source.choice(files)
    path.unlink()
    return [path]


def _add(bundle: Path, files: list[Path], source: random.Random) -> list[Path]:
    path = source.choice(files).parent / f"extra{source.randrange(10**6)}"
    path.write_bytes(b"")
    return [path]


def _link_part(bundle: Path) -> str:
    path = bundle / "tasks/words/task.yaml"
    shutil.move(path, bundle.parent / "elsewhere")
    path.symlink_to(bundle.parent / "elsewhere")
    return "tasks/words/task.yaml is no plain file"


def _extra_link(bundle: Path) -> str:
    (bundle / "link").symlink_to("/")
    return "link does not belong here"


def _extra_folder(bundle: Path) -> str:
    (bundle / "empty").mkdir()
    return "empty does not belong here"


def _folder_for_file(bundle: Path) -> str:
    (bundle / "tasks/words/task.yaml").unlink()
    (bundle / "tasks/words/task.yaml").mkdir()
    return "tasks/words/task.yaml is no plain file"


def _pipe(bundle: Path) -> str:
    (bundle / "tasks/words/task.yaml").unlink()
    os.mkfifo(bundle / "tasks/words/task.yaml")
    return "tasks/words/task.yaml is no plain file"


def _linked_list(bundle: Path) -> str:
    shutil.move(bundle / CHECKSUMS, bundle.parent / "list")
    (bundle / CHECKSUMS).symlink_to(bundle.parent / "list")
    return f"{CHECKSUMS} is no plain file"


def _capital_signature(bundle: Path) -> str:
    (bundle / SIGNATURE).write_text((bundle / SIGNATURE).read_text().upper())
    return SIGNATURE


@pytest.mark.parametrize(
    "change",
    [_link_part, _extra_link, _extra_folder, _folder_for_file, _pipe, _linked_list, _capital_signature],
)
def test_what_is_no_plain_file_is_refused(
    bundle: Path, trusted: bytes, change: Callable[[Path], str]
) -> None:
    expected = change(bundle)
    with pytest.raises(BundleError, match=expected):
        check(bundle, BUNDLE, trusted)


def test_every_fault_is_named_at_once(bundle: Path, trusted: bytes) -> None:
    (bundle / "legal/NOTICE.txt").write_bytes(b"x")
    (bundle / "tasks/words/task.yaml").unlink()
    (bundle / "new").touch()
    with pytest.raises(BundleError) as refused:
        check(bundle, BUNDLE, trusted)
    assert len(refused.value.faults) == 3


def test_another_key_and_another_kind_are_refused(
    bundle: Path, tmp_path: Path, key: Path, trusted: bytes
) -> None:
    keys.make_if_missing(tmp_path / "other.key")
    with pytest.raises(BundleError, match="do not belong to the key"):
        check(bundle, BUNDLE, keys.public(tmp_path / "other.key"))
    for kind in (EXPORT, BACKUP):
        with pytest.raises(BundleError, match=f"a {BUNDLE}, not a {kind}"):
            check(bundle, kind, trusted)


EVIL = {
    "above": "../outside",
    "far above": "tasks/../../outside",
    "absolute": "/etc/cron.d/homestill",
    "backslashes": "tasks\\words",
    "empty piece": "tasks//words",
    "the list itself": "checksums.json",
    "a device of Windows' kind": "tasks/con:1",
    "a line end": "tasks/a\nb",
    "another form of the same letters": "tasks/cafe\u0301",
    "too long": "tasks/" + "x" * 300,
}


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL.keys())
def test_a_signed_list_with_such_a_name_is_refused(
    bundle: Path, key: Path, trusted: bytes, name: str
) -> None:
    """Even whoever has the key cannot write outside of the folder that is loaded into."""
    _resign(bundle, key, lambda found: _rename(found, 2, name))
    with pytest.raises(BundleError, match="rename"):
        check(bundle, BUNDLE, trusted)


def test_a_signed_list_with_a_name_twice_or_in_two_cases_is_refused(
    bundle: Path, key: Path, trusted: bytes
) -> None:
    for name in ("tasks/words/task.yaml", "Tasks/Words/TASK.yaml", "tasks/words"):
        _resign(bundle, key, lambda found, name=name: _rename(found, 5, name))  # type: ignore[misc]
        with pytest.raises(BundleError, match="rename one"):
            check(bundle, BUNDLE, trusted)


def test_a_signed_list_that_contradicts_itself_is_refused(bundle: Path, key: Path, trusted: bytes) -> None:
    def shorten(found: dict[str, object]) -> None:
        found["files"][1]["bytes"] -= 1  # type: ignore[index]

    _resign(bundle, key, shorten)
    with pytest.raises(BundleError, match="does not agree with its parts"):
        check(bundle, BUNDLE, trusted)


def test_a_list_with_a_key_twice_or_of_a_later_schema_is_refused(
    bundle: Path, key: Path, trusted: bytes
) -> None:
    text = (bundle / CHECKSUMS).read_text()
    keys.sign(bundle, key, text.replace('"schema"', '"kind": "x", "schema"', 1).encode())
    with pytest.raises(BundleError, match="twice"):
        check(bundle, BUNDLE, trusted)
    keys.sign(bundle, key, text.replace('"schema": 1', '"schema": 2', 1).encode())
    with pytest.raises(BundleError, match="upgrade Homestill"):
        check(bundle, BUNDLE, trusted)


def test_what_changes_after_verification_is_seen_while_it_is_read(bundle: Path, trusted: bytes) -> None:
    contents = check(bundle, BUNDLE, trusted)
    file = contents.below("tasks")[0]
    (bundle / file.parts[0].name).write_bytes(b"name: wards\n")
    with pytest.raises(BundleError, match="has changed since"):
        list(chunks(bundle, file))


def test_a_key_is_64_hex_digits_or_a_file_of_them(tmp_path: Path, key: Path, trusted: bytes) -> None:
    assert trusted_key(trusted.hex()) == trusted_key(f"{key}.pub") == trusted
    for wrong in ("abc", str(key), str(tmp_path / "nowhere")):
        with pytest.raises(BundleError, match="no public key"):
            trusted_key(wrong)


def _rename(found: dict[str, object], place: int, name: str) -> None:
    file = found["files"][place]  # type: ignore[index]
    file["path"] = name
    file["parts"][0]["name"] = name


def _resign(bundle: Path, key: Path, change: Callable[[dict[str, object]], None]) -> None:
    found = json.loads((bundle / CHECKSUMS).read_text())
    change(found)
    keys.sign(bundle, key, json.dumps(found).encode())
