"""Bundles are written once: what is there and right is kept, what is not is written again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.trainer.bundle.samples import CREATED, FILES, write_bundle
from trainer.bundle import keys
from trainer.bundle.__main__ import main
from trainer.bundle.contents import BACKUP, BUNDLE, UNFINISHED, Contents
from trainer.bundle.verify import check
from trainer.bundle.write import Source, write
from trainer.errors import BundleError, DiskError


def test_a_key_that_is_there_has_its_public_half_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "box.key"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(keys, "durable", die)
        keys.make_if_missing(key)
    assert not key.exists()
    assert keys.make_if_missing(key)
    assert (tmp_path / "box.key.pub").read_text() == f"{keys.public(key).hex()}\n"
    assert not keys.make_if_missing(key)


def test_parts_join_to_the_files_with_plain_tools(tmp_path: Path, key: Path) -> None:
    write_bundle(tmp_path / "bundle", key)
    path, data = next((path, data) for path, data in FILES.items() if path.endswith("model.gguf"))
    parts = sorted((tmp_path / "bundle" / path).parent.glob("model.gguf.*"))
    assert [each.stat().st_size for each in parts] == [1000] * 5 + [120]
    assert b"".join(each.read_bytes() for each in parts) == data


def test_a_second_bundle_in_the_same_folder_keeps_what_did_not_change(
    tmp_path: Path, key: Path, trusted: bytes
) -> None:
    folder = tmp_path / "bundle"
    write_bundle(folder, key)
    before = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    changed = {**FILES, "tasks/words/task.yaml": b"name: wards\n", "tasks/words/new.py": b"\n"}
    del changed["legal/NOTICE.txt"]
    write_bundle(folder, key, changed, created="20261122T000000Z")
    check(folder, BUNDLE, trusted)
    assert not (folder / "legal").exists()
    for path, inode in before.items():
        same = path.exists() and path.stat().st_ino == inode
        assert same == (path.name not in ("task.yaml", "NOTICE.txt", "checksums.json", "checksums.sig"))


@contextmanager
def _dies_after(count: int, data: bytes) -> Iterator[BinaryIO]:
    class Dying(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= count:
                raise KeyboardInterrupt
            return super().read(size)

    yield Dying(data)


def test_an_interrupted_bundle_goes_on_where_it_stopped(tmp_path: Path, key: Path, trusted: bytes) -> None:
    folder, data = tmp_path / "bundle", bytes(range(200)) * 50
    reads = 0

    @contextmanager
    def whole() -> Iterator[BinaryIO]:
        nonlocal reads
        reads += 1
        yield io.BytesIO(data)

    first = Source("images/one.tar", 4000, whole, fixed=True)
    options: dict[str, Any] = {
        "kind": BUNDLE,
        "created": CREATED,
        "homestill": "0",
        "about": {},
        "seal": lambda where, text: keys.sign(where, key, text),
        "part_bytes": 1000,
    }
    dying = Source("tasks/two", len(data), lambda: _dies_after(3500, data))
    with pytest.raises(KeyboardInterrupt):
        write(folder, [first, dying], **options)
    with pytest.raises(BundleError, match="cannot be read"):
        check(folder, BUNDLE, trusted)
    kept = {path: path.stat().st_ino for path in folder.glob("tasks/two.00[0-2]")}
    assert len(kept) == 3
    write(folder, [first, Source.data("tasks/two", data)], **options)
    contents = check(folder, BUNDLE, trusted)
    assert [len(file.parts) for file in contents.files] == [10, 10]
    assert reads == 1, "the image was saved twice"
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert not (folder / UNFINISHED).exists()


@pytest.mark.parametrize("part_bytes", [1000, 10**6])
def test_an_image_that_broke_off_is_saved_again(
    tmp_path: Path, key: Path, trusted: bytes, part_bytes: int
) -> None:
    data = bytes(range(200)) * 50

    @contextmanager
    def saved(sent: int) -> Iterator[BinaryIO]:
        yield io.BytesIO(data[:sent])
        if sent < len(data):
            raise BundleError(["docker save ended with 1"])

    def bundle(sent: int) -> Contents:
        return write(
            tmp_path / "b",
            [Source("images/one.tar", len(data), lambda: saved(sent), fixed=True)],
            kind=BUNDLE,
            created=CREATED,
            homestill="0",
            about={},
            seal=lambda where, text: keys.sign(where, key, text),
            part_bytes=part_bytes,
        )

    with pytest.raises(BundleError, match="docker save"):
        bundle(3500)
    assert [file.bytes for file in bundle(len(data)).files] == [len(data)]
    check(tmp_path / "b", BUNDLE, trusted)


def test_a_part_that_was_damaged_meanwhile_is_written_again(
    tmp_path: Path, key: Path, trusted: bytes
) -> None:
    folder = tmp_path / "bundle"
    write_bundle(folder, key)
    (part,) = folder.rglob("model.gguf.002")
    parts = (folder / "tasks/words/task.yaml", part)
    before = [path.read_bytes() for path in parts]
    for change in (b"", b"x" * 1000, b"y" * 2000):
        for path in parts:
            path.write_bytes(change)
        with pytest.raises(BundleError):
            check(folder, BUNDLE, trusted)

        write_bundle(folder, key)

        assert [path.read_bytes() for path in parts] == before
        check(folder, BUNDLE, trusted)


def test_a_small_image_has_one_part_under_its_own_name(tmp_path: Path, key: Path, trusted: bytes) -> None:
    @contextmanager
    def small() -> Iterator[BinaryIO]:
        yield io.BytesIO(b"tar")

    source = Source("images/one.tar", 10**6, small, fixed=True)
    for _ in range(2):
        write(
            tmp_path / "b",
            [source],
            kind=BUNDLE,
            created=CREATED,
            homestill="0",
            about={},
            seal=lambda where, text: keys.sign(where, key, text),
            free=lambda _: 10**9,
        )
        assert [part.name for part in check(tmp_path / "b", BUNDLE, trusted).parts()] == ["images/one.tar"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, key: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(BundleError, match="is not empty"):
        write_bundle(tmp_path, key)
    assert [each.name for each in tmp_path.iterdir()] == ["letter.txt"]


def _held(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stranger", ["letter.txt", "photos/one.jpg", "tasks/words/notes.md"])
def test_what_somebody_put_beside_a_bundle_is_never_removed(tmp_path: Path, key: Path, stranger: str) -> None:
    write_bundle(tmp_path / "b", key)
    (tmp_path / "b" / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / "b" / stranger).write_text("dear")
    before = _held(tmp_path)
    with pytest.raises(BundleError, match=f"also holds '{stranger}', which Homestill did not write"):
        write_bundle(tmp_path / "b", key, created="20261122T000000Z")
    assert _held(tmp_path) == before


@pytest.mark.parametrize("text", ['{"letter.txt": "0a1b"}', '{"files": []}', "[]", "no JSON"])
def test_a_list_of_another_make_does_not_make_a_folder_ours(tmp_path: Path, key: Path, text: str) -> None:
    (tmp_path / "checksums.json").write_text(text)
    (tmp_path / "letter.txt").write_text("dear")
    before = _held(tmp_path)
    with pytest.raises(BundleError, match=r"checksums\.json is not the list of a homestill-bundle"):
        write_bundle(tmp_path, key)
    assert _held(tmp_path) == before


def test_a_bundle_does_not_take_the_place_of_a_backup(tmp_path: Path, key: Path) -> None:
    write_bundle(tmp_path, key, kind=BACKUP)
    with pytest.raises(BundleError, match="is not the list of a homestill-bundle"):
        write_bundle(tmp_path, key)


def test_what_appears_while_a_bundle_is_written_stays(tmp_path: Path, key: Path) -> None:
    def seal(folder: Path, text: bytes) -> None:
        assert (folder / "tasks/late.txt").exists()
        keys.sign(folder, key, text)

    def late() -> BinaryIO:
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks/late.txt").touch()
        return io.BytesIO(b"x")

    source = Source("tasks/words/task.yaml", 1, late)
    write(tmp_path, [source], kind=BUNDLE, created=CREATED, homestill="0", about={}, seal=seal)
    assert (tmp_path / "tasks/late.txt").exists()


def test_what_a_killed_bundle_left_is_ours(tmp_path: Path, key: Path, trusted: bytes) -> None:
    data = bytes(range(200)) * 50
    dying = Source("tasks/two", len(data), lambda: _dies_after(3500, data))
    options: dict[str, Any] = {"kind": BUNDLE, "created": CREATED, "homestill": "0", "about": {}}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", [dying], seal=lambda *_: None, part_bytes=1000, **options)
    assert sorted(path.name for path in (tmp_path / "b" / "tasks").iterdir())[0] == ".two.003.partial"
    write_bundle(tmp_path / "b", key)  # of other files
    check(tmp_path / "b", BUNDLE, trusted)


def test_a_full_medium_is_noticed_before_anything_is_written(tmp_path: Path, key: Path) -> None:
    with pytest.raises(DiskError, match="GB more"):
        write_bundle(tmp_path / "b", key, free=lambda _: 100)


def test_a_bundle_that_is_refused_leaves_the_earlier_one_whole(
    tmp_path: Path, key: Path, trusted: bytes
) -> None:
    folder = tmp_path / "b"
    write_bundle(folder, key)
    with pytest.raises(DiskError):
        write_bundle(folder, key, {**FILES, "tasks/words/more": bytes(2000)}, free=lambda _: 1000)
    with pytest.raises(DiskError):  # what the earlier one holds under other names makes no room until the end
        write_bundle(folder, key, {"tasks/words/other": bytes(2000)}, free=lambda _: 1000)
    with pytest.raises(BundleError, match="not every medium"):
        write_bundle(folder, key, {"tasks/a:b": b"x"})
    assert check(folder, BUNDLE, trusted).created == CREATED


@pytest.mark.parametrize("name", ["tasks/a:b", "tasks/ends.", "tasks/con*"])
def test_names_that_a_medium_cannot_hold_are_refused(tmp_path: Path, key: Path, name: str) -> None:
    with pytest.raises(BundleError, match="not every medium"):
        write_bundle(tmp_path / "b", key, {name: b"x"})


def test_the_key_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "box.key"
    assert keys.make_if_missing(path)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert not keys.make_if_missing(path)
    assert path.read_bytes() == before
    path.chmod(0o644)
    with pytest.raises(BundleError, match="chmod 600"):
        keys.make_if_missing(path)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("none")
    with pytest.raises(BundleError, match="Ed25519"):
        keys.public(tmp_path / "key")


def test_a_copy_goes_on_where_it_stopped(
    tmp_path: Path, key: Path, trusted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    write_bundle(source, key)
    command = ["copy", str(source), str(target), "--trust", trusted.hex()]
    assert main(command) == 0
    inodes = {path: path.stat().st_ino for path in target.rglob("*.00*")}
    (target / "checksums.json").unlink()
    (target / "tasks/words/task.yaml").write_bytes(b"half")
    assert main(command) == 0
    check(target, BUNDLE, trusted)
    assert {path: path.stat().st_ino for path in target.rglob("*.00*")} == inodes
    assert main(["verify", str(target), "--trust", "ab" * 32]) == 1
    assert "do not belong to the key" in capsys.readouterr().err
