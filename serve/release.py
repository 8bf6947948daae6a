"""A release on disk: its manifest, its router, and the check that both are what was signed off.

    releases/<task>/current              a file with the version in use
    releases/<task>/<version>/           manifest.json and the files that it lists with their SHA-256

A release is read whole and checked, or refused whole: `ReleaseInvalid` lists every fault found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from serve.manifest import SCHEMA, VERSION, Manifest, Part, RouterFile

UNLISTED = frozenset({"manifest.json", "gate.json"})
"""Files of a release that the manifest does not list: itself, and the gate's verdict on it."""
INTERFACE = "interface.json"
NOT_CONTENT = frozenset({"report.html"})
"""Files that hold measured times and so differ between two runs with the same outcome."""


PartT = TypeVar("PartT", bound=Part)


class ReleaseInvalid(Exception):
    """A release cannot be used; `faults` says why, one line each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


@dataclass(frozen=True)
class Release:
    """A release whose every file has the hash that the manifest gives."""

    folder: Path
    manifest: Manifest
    router: RouterFile

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def model(self) -> Path:
        """The whole model, or the base that `lora` is put on."""
        return self.folder / (self.manifest.model.base or self.manifest.model.file)

    @property
    def lora(self) -> Path | None:
        """The adapter that makes the student of `model`; None where that is the student."""
        return self.folder / self.manifest.model.file if self.manifest.model.base else None

    @property
    def neighbours(self) -> Path | None:
        return self.folder / self.router.neighbours if self.router.neighbours else None

    @property
    def program(self) -> Path:
        """State of the DSPy program, as JSON."""
        return self.folder / "program.json"

    @property
    def interface(self) -> Path | None:
        """The program's inputs and outputs as JSON schemas; None in releases from before there was one."""
        return self.folder / INTERFACE if INTERFACE in self.manifest.files else None

    @property
    def task(self) -> Path:
        return self.folder / "task.yaml"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def content_hash(files: Mapping[str, str]) -> str:
    """First 8 hex digits of the hash over all files (name to `sha256:…`) but those with measured times."""
    content = {name: digest for name, digest in files.items() if name not in NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]


def load(folder: Path) -> Release:
    """Read a release and check its schema, every file's hash, and what the router is bound to.

    Raises:
        ReleaseInvalid: something is missing, extra, altered, or does not belong together.
    """
    manifest = _read(folder / "manifest.json", Manifest)
    faults = _file_faults(folder, manifest.files)
    if faults:
        raise ReleaseInvalid(faults)
    release = Release(folder, manifest, _read(folder / "router.json", RouterFile))
    faults = _binding_faults(release)
    if faults:
        raise ReleaseInvalid(faults)
    return release


def versions(folder: Path) -> list[str]:
    """Versions in a task's releases folder, oldest first. Says nothing about their hashes."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if VERSION.fullmatch(entry.name) and (entry / "manifest.json").is_file()
    )


def current_version(folder: Path) -> str | None:
    """The version that `current` names; cheap enough to ask again and again.

    Raises:
        ReleaseInvalid: `current` holds something that is no version.
    """
    try:
        version = (folder / "current").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not VERSION.fullmatch(version):
        raise ReleaseInvalid([f'{folder / "current"} holds "{version[:60]}", no version; run rollback'])
    return version


def current(folder: Path) -> Release | None:
    """The release in use in a task's releases folder, checked; None before the first one.

    Raises:
        ReleaseInvalid: as `load`, or `current` names a release that is not there.
    """
    version = current_version(folder)
    return load(folder / version) if version else None


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, kind: type[PartT]) -> PartT:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ReleaseInvalid([f"{path} is missing; run release again, or roll back"]) from None
    except ValidationError as error:
        raise ReleaseInvalid([_schema_fault(path, dict(fault)) for fault in error.errors()]) from error


def _schema_fault(path: Path, fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if where == "schema":
        return f"{path} has schema {fault['input']}, this version reads {SCHEMA}; upgrade Homestill"
    return f"{path}: {where or 'the file'}: {fault['msg']}; run release again, or roll back"


def _file_faults(folder: Path, files: Mapping[str, str]) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    found = {path.relative_to(folder).as_posix() for path in paths}
    faults = [f"{folder / name} is missing; restore it, or roll back" for name in sorted(set(files) - found)]
    faults += [
        f"{folder / name} is not in the manifest; remove it, or roll back"
        for name in sorted(found - set(files) - UNLISTED)
    ]
    faults += [
        f"{folder / name} is not the file that was released (its SHA-256 differs); restore it, or roll back"
        for name in sorted(set(files) & found)
        if file_digest(folder / name) != files[name]
    ]
    return faults


def _binding_faults(release: Release) -> list[str]:
    manifest, router = release.manifest, release.router
    model = manifest.model
    bound_base = f"sha256:{router.binds.base}" if router.binds.base else None
    pairs = [
        ("base that router.json binds", bound_base, manifest.files.get(model.base) if model.base else None),
        ("task of router.json", router.task, manifest.task),
        ("model that router.json binds", router.binds.model, model.sha256),
        ("quantization that router.json binds", router.binds.quantization, model.quantization),
        ("hash of the model file", manifest.files.get(model.file), f"sha256:{model.sha256}"),
        ("threshold of router.json", router.threshold, manifest.router.threshold),
        ("certified of router.json", router.certified, manifest.router.certified),
        ("content of the files", content_hash(manifest.files), manifest.version.rpartition("-")[2]),
        ("name of the folder", release.folder.name, manifest.version),
    ]
    faults = [
        f"{release.folder}: {what} is {found}, the manifest says {said}; run release again, or roll back"
        for what, found, said in pairs
        if found != said
    ]
    if router.neighbours and router.neighbours not in manifest.files:
        faults.append(f"{release.folder}: the manifest lacks {router.neighbours}; run release again")
    return faults
