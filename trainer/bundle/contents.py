"""What a bundle holds: checksums.json, with the SHA-256 of every file and of every part that it is cut into.

    checksums.json   {"kind", "schema", "created", "homestill", "about",
                      "files": [{"path", "bytes", "sha256", "parts": [{"name", "bytes", "sha256"}, …]}, …]}
    checksums.sig    Ed25519 over the bytes of checksums.json, 128 hex digits and a line end

A file that fits into one part lies under its own path; a larger one as `<path>.000`, `<path>.001`, …, which
`cat` joins again. Names are plain: nothing leaves the folder, and no two differ in case alone, since the
media that carry them may not tell them apart.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.errors import BundleError

CHECKSUMS, SIGNATURE, UNFINISHED = "checksums.json", "checksums.sig", ".unfinished"
BUNDLE, EXPORT, BACKUP = "homestill-bundle", "homestill-export", "homestill-backup"
SCHEMA = 1
LONGEST_NAME = 200
SHA256 = re.compile(r"[0-9a-f]{64}")
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
"""What some file system of a medium cannot hold, or reads as something else."""


@dataclass(frozen=True)
class Part:
    """One file on the medium."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class File:
    """One file as it was, and the parts that it travels in."""

    path: str
    bytes: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def section(self) -> str:
        """What it is, by its first folder: images, releases, tasks, bases, traces, legal."""
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Contents:
    """A bundle's list of contents. `about` says what no file says, such as each task's current release."""

    kind: str
    created: str
    """UTC, as `20261121T073000Z`; such texts sort as the moments do."""
    homestill: str
    about: Mapping[str, Any]
    files: tuple[File, ...]

    def text(self) -> bytes:
        """checksums.json."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n").encode()

    def parts(self) -> Iterator[Part]:
        for file in self.files:
            yield from file.parts

    def below(self, section: str) -> list[File]:
        return [file for file in self.files if file.section == section]


def part_name(path: str, number: int, *, single: bool) -> str:
    return path if single else f"{path}.{number:03}"


def parse(data: bytes, kind: str) -> Contents:
    """Read checksums.json.

    Raises:
        BundleError: it is damaged, of another kind or schema, or lists what no bundle may hold.
    """
    try:
        found = json.loads(data, object_pairs_hook=_no_duplicates)
        _require_kind(found, kind)
        files = tuple(_file(each) for each in found["files"])
        contents = Contents(kind, found["created"], found["homestill"], found["about"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError([f"{CHECKSUMS} is damaged ({error}); copy it again"]) from error
    faults = [fault for file in files for fault in _file_faults(file)]
    faults += name_faults([part.name for part in contents.parts()])
    if faults:
        raise BundleError(faults)
    return contents


def name_faults(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of a bundle's parts, one line each."""
    faults, seen = [], {name.casefold(): name for name in (CHECKSUMS, SIGNATURE, UNFINISHED)}
    folders = {
        "/".join(name.casefold().split("/")[:depth])
        for name in names
        for depth in range(1, name.count("/") + 1)
    }
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if reason := _unfit(name):
            faults.append(f"{name!r} {reason}; rename it")
        elif other is not name:
            faults.append(f"{name!r} is there twice, or differs from {other!r} in case alone; rename one")
        elif name.casefold() in folders:
            faults.append(f"{name!r} is a file and a folder; rename one")
    return faults


def _unfit(name: str) -> str:
    pieces = name.split("/")
    if name.startswith("/") or any(piece in ("", ".", "..") for piece in pieces):
        return "leaves the bundle, or is no plain path"
    if FORBIDDEN.search(name) or any(piece[-1] in ". " for piece in pieces):
        return "holds a character that not every medium can store"
    if max(len(piece.encode()) for piece in pieces) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return "" if unicodedata.normalize("NFC", name) == name else "is not in Unicode's NFC form"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _require_kind(found: Mapping[str, Any], kind: str) -> None:
    if found["kind"] != kind:
        raise BundleError([f"this is a {found['kind']}, not a {kind}; name the right folder"])
    if found["schema"] != SCHEMA:
        raise BundleError(
            [f"{CHECKSUMS} has schema {found['schema']}, this version reads {SCHEMA}; upgrade Homestill"]
        )
    if not all(isinstance(found[key], str) for key in ("created", "homestill")) or not isinstance(
        found["about"], dict
    ):
        raise ValueError("created, homestill or about is of another type")


def _file(found: Mapping[str, Any]) -> File:
    parts = tuple(Part(each["name"], each["bytes"], each["sha256"]) for each in found["parts"])
    for each in (
        found["path"],
        found["sha256"],
        *(text for part in parts for text in (part.name, part.sha256)),
    ):
        if not isinstance(each, str):
            raise ValueError(f"{each!r} is no text")
    for size in (found["bytes"], *(part.bytes for part in parts)):
        if type(size) is not int or size < 0:
            raise ValueError(f"{size!r} is no size")
    return File(found["path"], found["bytes"], found["sha256"], parts)


def _file_faults(file: File) -> list[str]:
    single = len(file.parts) == 1
    expected = [part_name(file.path, number, single=single) for number in range(len(file.parts))]
    hashes = [file.sha256, *(part.sha256 for part in file.parts)]
    sound = (
        [part.name for part in file.parts] == expected != []
        and sum(part.bytes for part in file.parts) == file.bytes
        and all(SHA256.fullmatch(each) for each in hashes)
        and (not single or hashes[0] == hashes[1])
    )
    return (
        []
        if sound
        else [f"{file.path!r} in {CHECKSUMS} does not agree with its parts; make the bundle again"]
    )
