"""Installing or upgrading from a bundle. Python's standard library alone; traces need an importer from outside.

Everything is verified before anything is written, and again while it is written. Whatever is there already
is kept, so the same command can be given again after any interruption. What is in use changes last: a
release is put beside the others whole, and `current` names it only when all the rest is in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from trainer.bundle.contents import Contents, File
from trainer.bundle.verify import chunks, extract, part_is
from trainer.errors import BundleError, BusyError, DiskError

RECORD = "bundle.json"
Say = Callable[[str], None]
Import = Callable[[Path], str]
"""Takes a file of traces into the store; says what it took."""
Register = Callable[[str, str, Any], str]
"""Given task, version and what the bundle tells about its model; says what it did."""


@dataclass(frozen=True)
class Host:
    """Where a bundle is installed.

    Args:
        home: HOMESTILL_HOME.
        tasks: the folder of task folders.
        hub: Hugging Face's cache of models (`$HF_HOME/hub`).
        docker: the engine's command; None: images are left in the bundle.
        box: where compose.yaml and what belongs to it are put.
        take_traces: None: traces are left in the bundle.
        register: makes a release's model servable where a server of its own needs it; None: nothing does.
    """

    home: Path
    tasks: Path
    hub: Path
    docker: str | None = None
    box: Path | None = None
    take_traces: Import | None = None
    register: Register | None = None


def load_box(folder: Path, contents: Contents, host: Host, say: Say, *, force: bool = False) -> None:
    """Give the engine its images, and `host.box` the compose files and tasks; their volumes are loaded from inside.

    Tasks lie in a folder of the host's user, which the containers may read and not write.

    Args:
        force: take a bundle that is older than the last one.

    Raises:
        BundleError: it is older than what is there, the engine refuses an image, or the medium changed meanwhile.
    """
    assert host.box is not None
    _not_older(host.box, contents, force)
    _images(folder, contents, host, say)
    for file in contents.below("box"):
        _box_file(folder, file, host.box.joinpath(*PurePosixPath(file.path).parts[1:]), say)
    say(f"compose files: in {host.box}")
    for group in _groups(contents, "tasks"):
        _task(folder, group, replace(host, tasks=host.box / "tasks"), say)
    _record(host.box, contents)


def _box_file(folder: Path, file: File, target: Path, say: Say) -> None:
    """People edit compose files; what differs is kept beside."""
    if part_is(target, file):
        return
    if target.is_file():
        before = target.with_name(f"{target.name}.before")
        shutil.copyfile(target, before)
        say(f"{target}: replaced, the former one is kept in {before.name}")
    extract(folder, file, target)


def load(folder: Path, contents: Contents, host: Host, say: Say, *, force: bool = False) -> None:
    """Install what the (verified) bundle holds.

    Args:
        force: take a bundle that is older than the last one, and releases older than the current ones.

    Raises:
        BundleError: it is older than what is installed, or the medium changed meanwhile.
        DiskError: there is no room.
        BusyError: another load is under way.
    """
    host.home.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold what people asked
    with _alone(host.home):
        _not_older(host.home, contents, force)
        _require_room(contents, host)
        _images(folder, contents, host, say)
        for group in _groups(contents, "releases"):
            _release(folder, group, host, say)
        for group in _groups(contents, "tasks"):
            _task(folder, group, host, say)
        _bases(folder, contents, host, say)
        _traces(folder, contents, host, say)
        for file in contents.below("legal"):
            extract(folder, file, host.home / file.path)
        for task, version in sorted(contents.about.get("current", {}).items()) if host.register else ():
            assert host.register is not None
            say(host.register(task, version, contents.about.get("models", {}).get(task)))
        _currents(contents, host, say, force)
        _record(host.home, contents)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with open(home / ".load.lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another load into {home} is under way; wait for it to end") from None
        yield


def _record(place: Path, contents: Contents) -> None:
    record = {"created": contents.created, "homestill": contents.homestill}
    _write(place / RECORD, json.dumps(record) + "\n")


def _not_older(place: Path, contents: Contents, force: bool) -> None:
    record = place / RECORD
    last = json.loads(record.read_text(encoding="utf-8"))["created"] if record.is_file() else ""
    if contents.created < last and not force:
        raise BundleError(
            [
                f"this bundle is of {contents.created}, one of {last} was loaded already; load it with --force all the same"
            ]
        )


def _require_room(contents: Contents, host: Host) -> None:
    """Files that are there already are counted as well: an upgrade needs room for both."""
    kept = ("images", "traces", "box")
    needed = sum(
        file.bytes for file in contents.files if file.section not in kept and not _is_there(file, host)
    )
    free = shutil.disk_usage(host.home).free
    if needed > free:
        raise DiskError(
            f"loading needs {needed / 1e9:.2f} GB below {host.home}, {free / 1e9:.2f} GB are free; "
            "free some space, homestill prune says what may go"
        )


def _is_there(file: File, host: Host) -> bool:
    return file.section == "releases" and (host.home / file.path).is_file()


def _images(folder: Path, contents: Contents, host: Host, say: Say) -> None:
    images = contents.below("images")
    if images and host.docker is None:
        say(
            f"{len(images)} container images stay in the bundle: there is no Docker here, or --no-images was given"
        )
        return
    for file in images:
        say(f"image {file.path} ({file.bytes / 1e6:.0f} MB) …")
        with subprocess.Popen(
            [str(host.docker), "load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as engine:
            assert engine.stdin is not None and engine.stdout is not None
            try:
                _feed(engine.stdin, chunks(folder, file))
            except BundleError:
                engine.kill()  # before it sees the end of what must not be used
                raise
            answer = engine.stdout.read().decode(errors="replace").strip()
        if engine.returncode:
            raise BundleError(
                [f"docker load refused {file.path}: {answer or engine.returncode}; is the engine up?"]
            )
        say(f"  {answer}")


def _feed(pipe: IO[bytes], content: Iterator[bytes]) -> None:
    """What the engine no longer wants to read, its own message explains."""
    try:
        for chunk in content:
            pipe.write(chunk)
        pipe.close()
    except BrokenPipeError:
        with suppress(BrokenPipeError):  # it tries to write what it still holds
            pipe.close()


def _groups(contents: Contents, section: str) -> list[list[File]]:
    """The files of one release or one task each."""
    depth = {"releases": 3, "tasks": 2}[section]
    groups: dict[tuple[str, ...], list[File]] = {}
    for file in contents.below(section):
        groups.setdefault(PurePosixPath(file.path).parts[:depth], []).append(file)
    return list(groups.values())


def _release(folder: Path, files: list[File], host: Host, say: Say) -> None:
    _, task, version = PurePosixPath(files[0].path).parts[:3]
    target = host.home / "releases" / task / version
    if _same(target, files, ignore={"gate.json"}):
        say(f"release {task} {version}: is there")
        return
    unpacked = _unpacked(folder, files, target.with_name(f".{version}.loading"))
    _swap(unpacked, target, target.with_name(f".{version}.damaged"))
    say(f"release {task} {version}: installed")


def _task(folder: Path, files: list[File], host: Host, say: Say) -> None:
    name = PurePosixPath(files[0].path).parts[1]
    target = host.tasks / name
    if _same(target, files, ignore=set()):
        say(f"task {name}: is there")
        return
    before = (
        host.tasks / ".load" / "before" / name
    )  # deeper than a task lies, so that nobody takes it for one
    _swap(_unpacked(folder, files, host.tasks / ".load" / "new" / name), target, before)
    say(f"task {name}: installed" + (f", the former one is kept in {before}" if before.exists() else ""))


def _unpacked(folder: Path, files: list[File], partial: Path) -> Path:
    """The files in a folder where nobody looks for them; what a killed load left there is made anew."""
    shutil.rmtree(partial, ignore_errors=True)
    depth = 3 if files[0].section == "releases" else 2
    for file in files:
        extract(folder, file, partial.joinpath(*PurePosixPath(file.path).parts[depth:]))
    return partial


def _same(target: Path, files: list[File], ignore: set[str]) -> bool:
    """Whether the folder holds exactly these files."""
    depth = 3 if files[0].section == "releases" else 2
    wanted = {"/".join(PurePosixPath(file.path).parts[depth:]): file for file in files}
    if not target.is_dir():
        return False
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    found = {name for name in found if "__pycache__" not in name}
    return found - ignore == set(wanted) - ignore and all(
        part_is(target / name, file) for name, file in wanted.items() if name not in ignore
    )


def _swap(partial: Path, target: Path, before: Path) -> None:
    """Put a folder in place of another, which is kept beside."""
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        before.parent.mkdir(parents=True, exist_ok=True)
        target.rename(before)
    partial.rename(target)


def _bases(folder: Path, contents: Contents, host: Host, say: Say) -> None:
    """Put base models where Hugging Face's libraries look for them: `bases/<models--org--name>/<revision>/…`."""
    revisions: dict[str, str] = {}
    for file in contents.below("bases"):
        _, model, revision, *rest = PurePosixPath(file.path).parts
        target = host.hub / model / "snapshots" / revision / Path(*rest)
        if not part_is(target, file):
            extract(folder, file, target)
        revisions[model] = revision
    for model, revision in revisions.items():
        _write(host.hub / model / "refs" / "main", revision)  # without a line end, as the libraries read it
        say(f"base {model.removeprefix('models--').replace('--', '/')}: in {host.hub}")


def _traces(folder: Path, contents: Contents, host: Host, say: Say) -> None:
    for file in contents.below("traces"):
        if host.take_traces is None:
            say(
                f"{file.path} stays in the bundle: load it where Homestill is installed, or in its trainer container"
            )
            continue
        carried = host.home / "inbox" / PurePosixPath(file.path).name
        extract(folder, file, carried)
        say(host.take_traces(carried))
        carried.unlink()


def _currents(contents: Contents, host: Host, say: Say, force: bool) -> None:
    for task, version in sorted(contents.about.get("current", {}).items()):
        current = host.home / "releases" / task / "current"
        there = current.read_text(encoding="utf-8").strip() if current.is_file() else ""
        if there == version:
            say(f"{task}: {version} is current")
        elif there > version and not force:
            say(f"{task}: {there} stays current, it is newer than {version}; --force takes the older one")
        else:
            _write(current, version + "\n")
            say(f"{task}: {version} is current now" + (f" in place of {there}" if there else ""))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
