"""What a bundle carries: tasks, their current releases and base models, traces, images, licences, and its own tool."""

from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serve import release as releases
from serve.release import ReleaseInvalid
from trainer import process
from trainer.bundle import legal
from trainer.bundle.carry import give
from trainer.bundle.models import facts
from trainer.bundle.secrets import Secrets
from trainer.bundle.write import Source
from trainer.errors import BundleError
from trainer.runs import Home
from trainer.task import Task
from trainer.training import base as bases

ROOT = Path(__file__).parents[2]
TOOL = "tool.pyz"
TOOL_FILES = ("trainer/__init__.py", "trainer/errors.py")
TOOL_PACKAGE = "trainer/bundle"
TOOL_MODULES = ("__init__", "__main__", "contents", "ed25519", "load", "meter", "verify")
DOCKER_TIMEOUT_S = 60.0

BOX = ("compose.yaml", ".env.example", "docker/*.yaml", "docker/no-secret")
"""What a host with Docker needs beside the images."""

README = """\
A signed Homestill bundle. You need the public key of whoever made it, from somewhere else than this medium.

    python3 tool.pyz verify --trust KEY            is every byte what was signed?
    python3 tool.pyz copy . /srv/bundle --trust KEY   copy; goes on where an earlier copy stopped
    python3 tool.pyz load --trust KEY --box DIR    with Docker: images, and compose files into DIR; says what comes next
    python3 tool.pyz load --trust KEY              without Docker: into HOMESTILL_HOME; safe to run again

tool.pyz needs Python 3.9 and nothing else. Whoever could change this bundle could change tool.pyz, too: run a
copy of it from an earlier, verified bundle, or `homestill verify`, where that matters. By hand:
checksums.sig is an Ed25519 signature of checksums.json in hex, and checksums.json has the SHA-256 of every file.
"""


@dataclass(frozen=True)
class Wanted:
    """What is to be carried.

    Args:
        tasks: each with its current release, its base model and its teacher's traces.
        images: names of container images in the engine here.
        releases, bases, traces: leave the like out.
        requests: also the endpoint's journal.
    """

    tasks: Sequence[Task]
    images: Sequence[str] = ()
    releases: bool = True
    bases: bool = True
    traces: bool = True
    requests: bool = False


@dataclass(frozen=True)
class Gathered:
    """Sources in the order in which they are written, and what no file says."""

    sources: list[Source]
    about: dict[str, Any]


def gather(wanted: Wanted, home: Home, environment: Mapping[str, str], work: Path, created: str) -> Gathered:
    """Find everything that is wanted.

    Args:
        work: a folder for the traces, which are exported first.
        created: as `20261121T073000Z`.

    Raises:
        BundleError: with everything that is missing, cannot be carried, or holds a key.
    """
    faults: list[str] = []
    carried: dict[str, Path] = {}
    current: dict[str, str] = {}
    models: dict[str, Path] = {}
    for task in wanted.tasks:
        for collect in (_task_files, _release_files, _base_files):
            try:
                carried.update(collect(task, wanted, home, environment, current, models))
            except BundleError as error:
                faults += error.faults
    secrets = Secrets(environment)
    faults += [
        f"{file} holds {found}; take it out, keys never travel"
        for file in carried.values()
        if (found := secrets.in_file(file))
    ]
    sources = [Source.file(path, file) for path, file in sorted(carried.items())]
    try:
        sources += traces_of(wanted, home, work, environment)
    except BundleError as error:
        faults += error.faults
    if faults:
        raise BundleError(faults)
    sources += [
        *_legal(models, created),
        Source.data("README.txt", README.encode()),
        Source.data(TOOL, tool()),
    ]
    if wanted.images:
        box = sorted({file for pattern in BOX for file in ROOT.glob(pattern)})
        sources += [Source.file(f"box/{file.relative_to(ROOT).as_posix()}", file) for file in box]
    told = {task: facts(home, task, version) for task, version in current.items()}
    images = [_image(name) for name in wanted.images]
    return Gathered([*images, *sources], {"current": current, "models": told, "images": list(wanted.images)})


def tool() -> bytes:
    """tool.pyz: verifier and loader in one file that plain Python runs; the same bytes every time."""
    names = [*TOOL_FILES, *(f"{TOOL_PACKAGE}/{name}.py" for name in TOOL_MODULES)]
    start = "import sys\nfrom trainer.bundle.__main__ import main\nsys.exit(main())\n"
    buffer = io.BytesIO(b"#!/usr/bin/env python3\n")
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, data in [
            ("__main__.py", start.encode()),
            *((name, (ROOT / name).read_bytes()) for name in names),
        ]:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def _task_files(task: Task, *_: Any) -> dict[str, Path]:
    found, faults = {}, []
    for path in sorted(task.folder.rglob("*")):
        parts = path.relative_to(task.folder).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts):
            continue
        if path.is_symlink():
            faults.append(f"{path} is a link; put the file itself into the task, links do not travel")
        elif path.is_file():
            found[f"tasks/{task.name}/{'/'.join(parts)}"] = path
    for files in task.data_files.values():
        faults += [
            f"{file} lies outside the task folder; move it in, so that it travels with the task"
            for file in files
            if not file.resolve().is_relative_to(task.folder)
        ]
    if faults:
        raise BundleError(faults)
    return found


def _release_files(
    task: Task, wanted: Wanted, home: Home, _: Any, current: dict[str, str], __: Any
) -> dict[str, Path]:
    if not wanted.releases:
        return {}
    try:
        release = releases.current(home.releases(task.name))  # its every hash is checked
    except ReleaseInvalid as error:
        raise BundleError(error.faults) from error
    if release is None:
        raise BundleError([f"{task.name} has no release in {home.root}; make one, or leave releases out"])
    current[task.name] = release.version
    names = [*release.manifest.files, "manifest.json", "gate.json"]
    return {
        f"releases/{task.name}/{release.version}/{name}": release.folder / name
        for name in names
        if (release.folder / name).is_file()
    }


def _base_files(
    task: Task, wanted: Wanted, _: Any, environment: Mapping[str, str], __: Any, models: dict[str, Path]
) -> dict[str, Path]:
    name = task.base_path()
    if Path(name).is_absolute():
        if not Path(name).is_relative_to(task.folder):
            raise BundleError([f"{name}, the base of {task.name}, lies outside the task folder; move it in"])
        models[f"{task.name}'s own base ({task.settings.student.base})"] = Path(name)
        return {}
    if not wanted.bases:
        return {}
    folder = _cached(name)
    models[name] = folder
    prefix = f"bases/{folder.parents[1].name}/{folder.name}"
    files = [*{file for pattern in bases.FILES for file in folder.glob(pattern)}, *legal.model_texts(folder)]
    return {f"{prefix}/{file.name}": file.resolve() for file in files}


def _cached(name: str) -> Path:
    """The folder `…/models--org--name/snapshots/<revision>` of a base that was downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=bases.FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise BundleError(
            [f"the base {name} is not in the local cache; train with it once, or leave bases out"]
        ) from error


def traces_of(wanted: Wanted, home: Home, work: Path, environment: Mapping[str, str]) -> list[Source]:
    """The tasks' traces, exported to `work`; none of a task that has none.

    Raises:
        BundleError: a row holds a key.
    """
    secrets, sources, faults = Secrets(environment), [], []
    for task in wanted.tasks if wanted.traces or wanted.requests else ():
        file = work / f"{task.name}.jsonl.gz"
        try:
            count = give(
                home, task.name, file, bought=wanted.traces, requests=wanted.requests, secrets=secrets
            )
        except BundleError as error:
            faults += error.faults
            continue
        if count:
            sources.append(Source.file(f"traces/{file.name}", file))
    if faults:
        raise BundleError(faults)
    return sources


def _legal(models: Mapping[str, Path], created: str) -> Iterator[Source]:
    software = legal.distributions()
    yield Source.data("legal/NOTICE.txt", legal.notice(models))
    yield Source.data("legal/third-party.txt", legal.third_party(software))
    yield Source.data("legal/sbom.json", legal.sbom(software, created))
    if (ROOT / "LICENSE").is_file():
        yield Source.file("legal/LICENSE", ROOT / "LICENSE")
    for name, folder in models.items():
        for file in legal.model_texts(folder):
            yield Source.file(f"{legal.model_folder(name)}/{file.name}", file.resolve())


def _image(name: str) -> Source:
    """An image as `docker save` writes it, under a name that says which build of it this is."""
    try:
        asked = process.run(
            ["docker", "image", "inspect", "--format", "{{.Id}} {{.Size}}", name], timeout=DOCKER_TIMEOUT_S
        )
    except FileNotFoundError:
        raise BundleError(
            [f"the image {name} is wanted and docker is not installed; bundle without images"]
        ) from None
    if asked.code:
        raise BundleError([f"the image {name} cannot be saved ({asked.last_line}); build or pull it first"])
    identity, size = asked.last_line.split()
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return Source(
        f"images/{plain}-{identity.removeprefix('sha256:')[:12]}.tar",
        int(size),
        lambda: _saved(name),
        fixed=True,
    )


@contextmanager
def _saved(name: str) -> Iterator[BinaryIO]:
    with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as engine:
        assert isinstance(engine.stdout, io.BufferedReader)
        yield engine.stdout
    if engine.returncode:
        raise BundleError([f"docker save {name} ended with {engine.returncode}; run the same command again"])
