"""Writing a bundle: sources become parts, parts that are right already are kept, the list is signed last.

While it is written, `.unfinished` notes every part that is complete, with its hash. A second call with the
same folder finds them there, or in the list of the bundle that the folder held before, and reads again only
what it must. Without checksums.json nobody takes the folder for a bundle.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.bundle.contents import (
    CHECKSUMS,
    SIGNATURE,
    UNFINISHED,
    Contents,
    File,
    Part,
    name_faults,
    parse,
    part_name,
)
from trainer.bundle.keys import durable
from trainer.bundle.meter import Meter
from trainer.bundle.verify import CHUNK, part_is, walk
from trainer.errors import BundleError, DiskError

LARGEST_PART = 4_000_000_000
"""Bytes: below the limit of FAT32, which many small media come with."""


@dataclass(frozen=True)
class Source:
    """Something to be carried.

    Args:
        path: its name in the bundle.
        size: bytes; about as many where it is a stream.
        open: gives its content.
        fixed: the name alone decides the content, so parts noted under it need not be read from the source again.
    """

    path: str
    size: int
    open: Callable[[], AbstractContextManager[BinaryIO]]
    fixed: bool = False

    @classmethod
    def file(cls, path: str, file: Path) -> Source:
        return cls(path, file.stat().st_size, lambda: open(file, "rb"))

    @classmethod
    def data(cls, path: str, data: bytes) -> Source:
        return cls(path, len(data), lambda: io.BytesIO(data))


@dataclass(frozen=True)
class _Noted:
    """A part that an earlier call completed; `last` where its file ends with it."""

    part: Part
    last: bool

    def line(self) -> str:
        return json.dumps({**asdict(self.part), "last": self.last}) + "\n"


def write(
    folder: Path,
    sources: Sequence[Source],
    *,
    kind: str,
    created: str,
    homestill: str,
    about: Mapping[str, Any],
    seal: Callable[[Path, bytes], None],
    part_bytes: int = LARGEST_PART,
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> Contents:
    """Write the parts of all sources into `folder`, and nothing else.

    Args:
        folder: new, empty, or one that an earlier call of the same kind wrote to, and nobody else.
        seal: writes the list of contents, given the folder and its text, and signs it where it is to be signed.
        part_bytes: most that one part holds.

    Raises:
        BundleError: the folder holds something else, or a name cannot be carried.
        DiskError: there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = _look(folder, kind)
    _require_no_others(folder, noted)
    _require_names([source.path for source in sources])
    _require_room(folder, sources, noted, free)
    _take(folder, noted)
    meter = Meter("writing", sum(source.size for source in sources))
    with open(folder / UNFINISHED, "a", encoding="utf-8") as notes:
        files = tuple(_Writer(folder, part_bytes, noted, notes, meter).write(source) for source in sources)
    contents = Contents(kind, created, homestill, about, files)
    names = [part.name for part in contents.parts()]
    if faults := name_faults(names):
        raise BundleError(faults)
    _remove_earlier(folder, noted.keys() - set(names))
    seal(folder, contents.text())
    (folder / UNFINISHED).unlink()
    return contents


class _Writer:
    """Cuts sources into parts, and keeps those that are there already."""

    def __init__(
        self, folder: Path, limit: int, noted: Mapping[str, _Noted], notes: Any, meter: Meter
    ) -> None:
        self._folder, self._limit, self._noted, self._notes, self._meter = folder, limit, noted, notes, meter

    def write(self, source: Source) -> File:
        kept = self._kept(source) if source.fixed else None
        if kept is None:
            whole = hashlib.sha256()
            with source.open() as stream:
                parts = self._cut(source, stream, whole)
            parts, digest = self._ended(source, parts), whole.hexdigest()
        else:
            parts, digest = kept
        return File(source.path, sum(part.bytes for part in parts), digest, tuple(parts))

    def _cut(self, source: Source, stream: BinaryIO, whole: hashlib._Hash) -> list[Part]:
        parts: list[Part] = []
        single = source.size <= self._limit and not source.fixed
        ahead = stream.read(min(CHUNK, self._limit))
        while ahead or not parts:
            if single and parts:
                raise BundleError([f"{source.path} grew while it was read; make the bundle again"])
            name = part_name(source.path, len(parts), single=single)
            part, ahead = self._part(name, stream, ahead, whole)
            parts.append(part)
        return parts

    def _ended(self, source: Source, parts: list[Part]) -> list[Part]:
        """Note the last part as such: a source that broke off reads as one that is at its end, until it is closed."""
        final = parts if len(parts) > 1 else [Part(source.path, parts[0].bytes, parts[0].sha256)]
        self._note(final[-1], last=True)
        if final != parts:
            os.replace(self._folder / parts[0].name, self._folder / source.path)
        return final

    def _part(self, name: str, stream: BinaryIO, ahead: bytes, whole: hashlib._Hash) -> tuple[Part, bytes]:
        """One part, and what was read beyond it: an empty end means that the source is at its end."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        digest, size = hashlib.sha256(), 0
        same = _Same(path)
        with open(partial, "wb") as out:
            while ahead and size < self._limit:
                for each in (digest, whole):
                    each.update(ahead)
                size += len(ahead)
                same.hold(ahead, out)
                self._meter.add(len(ahead))
                ahead = stream.read(min(CHUNK, self._limit - size or self._limit))
            kept = same.to_the_end(out)
            out.flush()
            os.fsync(out.fileno())
        part = Part(name, size, digest.hexdigest())
        self._note(part, last=False)  # first: what is there and is not noted, nobody takes for ours
        partial.unlink() if kept else os.replace(partial, path)
        return part, ahead

    def _kept(self, source: Source) -> tuple[list[Part], str] | None:
        """The noted parts of a source, where all are there and right."""
        parts: list[Part] = []
        for number in range(10_000):
            single = number == 0 and source.path in self._noted
            found = self._noted.get(part_name(source.path, number, single=single))
            if found is None or not part_is(self._folder / found.part.name, found.part):
                return None
            parts.append(found.part)
            self._meter.add(found.part.bytes)
            if found.last:
                return parts, self._joined(parts)
        return None

    def _joined(self, parts: Iterable[Part]) -> str:
        digest = hashlib.sha256()
        for part in parts:
            with open(self._folder / part.name, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    def _note(self, part: Part, *, last: bool) -> None:
        self._notes.write(_Noted(part, last).line())
        self._notes.flush()


class _Same:
    """Compares what comes with a part that is there, and writes only from the first difference on."""

    def __init__(self, path: Path) -> None:
        plain = path.is_file() and not path.is_symlink()
        self._there = open(path, "rb") if plain else None  # noqa: SIM115  closed in to_the_end
        self._equal = self._there is not None

    def hold(self, chunk: bytes, out: BinaryIO) -> None:
        if self._equal and self._there:
            at = self._there.tell()
            if self._there.read(len(chunk)) == chunk:
                return
            self._copy_before(at, out)
        out.write(chunk)

    def to_the_end(self, out: BinaryIO) -> bool:
        """Whether the part that is there is the one that came, to its last byte."""
        if self._there is None:
            return False
        at = self._there.tell()
        longer = self._equal and self._there.read(1) != b""
        if longer:
            self._copy_before(at, out)
        self._there.close()
        return self._equal

    def _copy_before(self, end: int, out: BinaryIO) -> None:
        assert self._there is not None
        self._equal = False
        self._there.seek(0)
        while end:
            chunk = self._there.read(min(CHUNK, end))
            out.write(chunk)
            end -= len(chunk)


def _look(folder: Path, kind: str) -> dict[str, _Noted]:
    """What earlier calls completed in the folder; what they left is not changed yet."""
    notes, listed = folder / UNFINISHED, folder / CHECKSUMS
    if not (notes.exists() or listed.exists()) and any(folder.iterdir()):
        raise BundleError([f"{folder} is not empty and holds no bundle; name a new folder"])
    found = _of_notes(notes) if notes.exists() else []
    found += _of_list(listed, kind) if listed.exists() else []
    return {each.part.name: each for each in found}


def _require_no_others(folder: Path, noted: Mapping[str, _Noted]) -> None:
    """What no earlier call wrote is not ours to remove, and `verify` would refuse it."""
    ours = {CHECKSUMS, SIGNATURE, UNFINISHED, *noted}
    others = [
        name
        for name, about in walk(folder)
        if not (stat.S_ISDIR(about.st_mode) or name in ours or _is_partial(name))
    ]
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise BundleError(
            [
                f"{folder} also holds {others[0]!r}{more}, which Homestill did not write; move it out, or name a new folder"
            ]
        )


def _take(folder: Path, noted: Mapping[str, _Noted]) -> None:
    """From here on the folder holds no bundle, until it holds the new one."""
    durable(folder / UNFINISHED, "".join(each.line() for each in noted.values()).encode())
    (folder / CHECKSUMS).unlink(missing_ok=True)
    (folder / SIGNATURE).unlink(missing_ok=True)


def _of_notes(path: Path) -> list[_Noted]:
    noted = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
            noted.append(_Noted(Part(found["name"], found["bytes"], found["sha256"]), found["last"]))
        except (ValueError, KeyError, TypeError):  # a kill cut the last line off
            continue
    return noted


def _of_list(path: Path, kind: str) -> list[_Noted]:
    try:
        files = parse(path.read_bytes(), kind).files
    except BundleError as error:
        raise BundleError(
            [f"{path} is not the list of a {kind} that this version reads; name a new folder"]
        ) from error
    return [_Noted(part, part is file.parts[-1]) for file in files for part in file.parts]


def _require_names(paths: Sequence[str]) -> None:
    if faults := name_faults(paths):
        raise BundleError(faults)


def _require_room(
    folder: Path, sources: Sequence[Source], noted: Mapping[str, _Noted], free: Callable[[Path], int]
) -> None:
    wanted = {source.path for source in sources}
    there = sum(
        each.part.bytes
        for name, each in noted.items()
        if not wanted.isdisjoint((name, name.rpartition(".")[0])) and (folder / name).is_file()
    )  # all else that is there is removed last
    needed, room = sum(source.size for source in sources) - there, free(folder)
    if needed > room:
        raise DiskError(
            f"the bundle needs {needed / 1e9:.2f} GB more below {folder}, {room / 1e9:.2f} GB are free; "
            "name a folder on a larger disk"
        )


def _is_partial(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".partial")


def _remove_earlier(folder: Path, names: Set[str]) -> None:
    """Drop the parts of an earlier bundle in this folder, half-written ones, and folders that are empty then."""
    for name, about in sorted(walk(folder), reverse=True):
        path = folder / name
        if stat.S_ISDIR(about.st_mode):
            if not any(path.iterdir()):
                path.rmdir()
        elif name in names or _is_partial(name):
            path.unlink()
