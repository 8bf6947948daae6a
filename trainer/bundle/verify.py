"""Is this bundle, byte for byte, what the owner of a key signed? Python's standard library alone.

Trust comes from outside: whoever verifies names the public key. A bundle that carries its own key, or its
own verifier, proves nothing to somebody who has neither from elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from trainer.bundle import ed25519
from trainer.bundle.contents import CHECKSUMS, SIGNATURE, Contents, File, Part, parse
from trainer.bundle.meter import Meter
from trainer.errors import BundleError

CHUNK = 1 << 20
LARGEST_LIST = 256 << 20
KEY = re.compile(r"[0-9a-f]{64}")
SIGNED = re.compile(rb"[0-9a-f]{128}\n")


def trusted_key(given: str) -> bytes:
    """The public key that a person names: its 64 hex digits, or a file that holds them.

    Raises:
        BundleError: neither.
    """
    text = given
    if not KEY.fullmatch(given) and Path(given).is_file():
        text = Path(given).read_bytes()[:100].decode("ascii", "replace").strip()
    if not KEY.fullmatch(text):
        raise BundleError(
            [f"{given!r} is no public key; give its 64 hex digits, or the .pub file beside the key"]
        )
    return bytes.fromhex(text)


def signed_contents(folder: Path, kind: str, key: bytes) -> Contents:
    """The list of contents, if it is signed with `key`; says nothing yet about the parts.

    Raises:
        BundleError: it is missing, damaged, or signed by nobody or somebody else.
    """
    data, signature = _small(folder / CHECKSUMS), _small(folder / SIGNATURE)
    if not SIGNED.fullmatch(signature) or not ed25519.verify(
        key, data, bytes.fromhex(signature[:-1].decode())
    ):
        raise BundleError(
            [
                f"{folder / CHECKSUMS} and {SIGNATURE} do not belong to the key {key.hex()}: one of them was changed, "
                "or another key signed it; copy both again, or ask the sender for the key"
            ]
        )
    return parse(data, kind)


def check(folder: Path, kind: str, key: bytes) -> Contents:
    """Verify the signature and every byte.

    Raises:
        BundleError: names every part that is changed, missing, extra, or no plain file.
    """
    contents = signed_contents(folder, kind, key)
    check_parts(folder, contents, {CHECKSUMS, SIGNATURE})
    return contents


def check_parts(folder: Path, contents: Contents, beside: set[str]) -> None:
    """Hold every part against the list.

    Args:
        beside: names that are not in the list and may be there.

    Raises:
        BundleError: as `check`.
    """
    listed = {part.name: part for part in contents.parts()}
    found = dict(walk(folder))
    parts = _Parts(folder, found, sum(part.bytes for part in listed.values()))
    for file in contents.files:
        parts.check(file)
    folders = {
        "/".join(name.split("/")[:depth]) for name in listed for depth in range(1, name.count("/") + 1)
    }
    for name in sorted(set(found) - set(listed) - beside):
        if not (stat.S_ISDIR(found[name].st_mode) and name in folders):
            parts.faults.append(f"{folder / name} does not belong here; remove it")
    if parts.faults:
        raise BundleError(parts.faults)


def chunks(folder: Path, file: File) -> Iterator[bytes]:
    """A file's content, its parts joined, and checked again while it is read: the medium may have changed since.

    Raises:
        BundleError: after the last chunk, if it is not what was signed; what was read must not be used then.
    """
    digest = hashlib.sha256()
    for part in file.parts:
        with open(folder / part.name, "rb") as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                yield chunk
    if digest.hexdigest() != file.sha256:
        raise BundleError(
            [f"{folder / file.path} has changed since it was verified; verify the bundle again"]
        )


def extract(folder: Path, file: File, target: Path) -> None:
    """Write a file of the bundle to `target`, whole or not at all.

    Raises:
        BundleError: as `chunks`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with open(partial, "wb") as out:
        for chunk in chunks(folder, file):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, target)


def part_is(path: Path, part: Part | File) -> bool:
    """Whether a plain file with exactly this content is there."""
    try:
        about = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size == part.bytes and file_sha256(path) == part.sha256


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class _Parts:
    """Holds parts against what is there, and collects what is wrong."""

    def __init__(self, folder: Path, found: dict[str, os.stat_result], total: int) -> None:
        self._folder, self._found = folder, found
        self._meter = Meter("verifying", total)
        self.faults: list[str] = []

    def check(self, file: File) -> None:
        whole = hashlib.sha256()
        wrong = [fault for part in file.parts for fault in self._wrong(part, whole)]
        if not wrong and whole.hexdigest() != file.sha256:
            wrong = [
                f"{self._folder / file.path}: its parts do not make the signed file; make the bundle again"
            ]
        self.faults += wrong

    def _wrong(self, part: Part, whole: hashlib._Hash) -> list[str]:
        about, path = self._found.get(part.name), self._folder / part.name
        if about is None:
            return [f"{path} is missing; copy it again"]
        if not stat.S_ISREG(about.st_mode):
            return [f"{path} is no plain file; copy the file itself"]
        if about.st_size != part.bytes:
            return [f"{path} has {about.st_size} bytes, {part.bytes} were signed; copy it again"]
        digest = hashlib.sha256()
        with open(path, "rb") as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                whole.update(chunk)
                self._meter.add(len(chunk))
        if digest.hexdigest() != part.sha256:
            return [f"{path} is not what was signed (its SHA-256 differs); copy it again"]
        return []


def walk(folder: Path, above: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything below the folder, by name; links are named, never followed."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            yield above + entry.name, entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path), f"{above}{entry.name}/")


def _small(path: Path) -> bytes:
    try:
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST_LIST:
            return path.read_bytes()
    except OSError as error:
        raise BundleError([f"{path} cannot be read ({error.strerror}); copy the bundle again"]) from error
    raise BundleError([f"{path} is no plain file of reasonable size; copy the bundle again"])
