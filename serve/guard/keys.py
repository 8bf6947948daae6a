"""Who may ask: API keys, of which only hashes are kept.

    HOMESTILL_HOME/keys.json    {"schema": 1, "keys": [{"name", "sha256", "created", "tasks", "egress", "daily_usd"}]}

A key of ours is 256 random bits, so one round of SHA-256 protects it at rest as well as a slow hash would.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.config import Egress, Usd
from serve.errors import SettingsError

PREFIX = "hs-"
LOOK_EVERY_S = 1.0
GIVEN = "env-"
"""How keys of the environment are called: env-1, env-2 ..."""


@dataclass(frozen=True)
class Caller:
    """Who asks, and what their key allows."""

    name: str
    tasks: frozenset[str] | None = None
    """None: all."""
    egress: Egress = "allow"
    daily_usd: float | None = None


ANONYMOUS = Caller("anonymous")
"""Everybody, where no keys are set up."""


class KeyEntry(BaseModel):
    """One key as it is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str
    tasks: tuple[str, ...] | None = None
    egress: Egress = "allow"
    daily_usd: Usd | None = None

    def caller(self) -> Caller:
        tasks = None if self.tasks is None else frozenset(self.tasks)
        return Caller(self.name, tasks, self.egress, self.daily_usd)


class KeysFile(BaseModel):
    """keys.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    keys: tuple[KeyEntry, ...] = ()


class Keys:
    """The keys in use: those of the environment, and those of keys.json, which is read again when it changes.

    Args:
        given: HOMESTILL_API_KEYS; they may ask everything.
        path: keys.json, which need not exist.
        clock: seconds, monotonic.
    """

    def __init__(self, given: Sequence[str], path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._given = [(_digest(key), Caller(f"{GIVEN}{at}")) for at, key in enumerate(given, 1)]
        self._path = path
        self._clock = clock
        self._looked = -math.inf
        self._stamp: tuple[int, int, int] | None = None
        self._known = self._given
        self._closed = False
        self.problem = ""
        """Why nobody is let in: keys.json cannot be used."""

    @property
    def required(self) -> bool:
        """Whether a key is needed. A broken keys.json counts: it was written to keep somebody out.

        Once one is needed it stays so until a restart, where the address listened on is judged anew: whoever
        revokes the last key wants to let in fewer, not everybody.
        """
        self._look()
        self._closed = self._closed or bool(self._known) or bool(self.problem)
        return self._closed

    def who(self, authorization: str | None) -> Caller | None:
        """Whose key an Authorization header holds; None lets nobody in. Every key is compared, in constant time."""
        if not self.required:
            return ANONYMOUS
        if self.problem:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = None
        for known, caller in self._known:
            if hmac.compare_digest(digest, known):
                found = caller
        return found if scheme.lower() == "bearer" else None

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp and not self.problem:  # what went wrong may be over without a change
                return
            stored = [(entry.sha256.encode(), entry.caller()) for entry in read(self._path).keys]
        except SettingsError as error:
            self.problem = str(error)
            return
        self.problem, self._stamp = "", stamp
        self._known = [*self._given, *stored]


def read(path: Path) -> KeysFile:
    """keys.json; empty where there is none.

    Raises:
        SettingsError: it is no keys file.
    """
    try:
        return KeysFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return KeysFile()
    except (OSError, ValidationError) as error:
        # what pydantic says would hold the file's content
        what = f"{error.error_count()} faults" if isinstance(error, ValidationError) else str(error)
        raise SettingsError(
            [f"{path} is no keys file ({what}); restore it, or remove it and add keys again"]
        ) from error


def add(
    path: Path, name: str, *, tasks: Sequence[str] | None, egress: Egress, daily_usd: float | None
) -> str:
    """A new key, which is told here and never again.

    Raises:
        SettingsError: the name is taken, or a value is not allowed.
    """
    if name == ANONYMOUS.name or name.startswith(GIVEN):
        raise SettingsError([f'name is "{name}", which others are called by (caps go by name); take another'])
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        entry = KeyEntry(
            name=name,
            sha256=hashlib.sha256(key.encode()).hexdigest(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tasks=None if tasks is None else tuple(tasks),
            egress=egress,
            daily_usd=daily_usd,
        )
    except ValidationError as error:
        raise SettingsError(
            [f"{fault['loc'][0]} is {fault['input']!r}: {fault['msg']}" for fault in error.errors()]
        ) from error
    with _alone(path):
        stored = read(path)
        if any(each.name == name for each in stored.keys):
            raise SettingsError(
                [f'there is a key named "{name}" already; revoke it first, or take another name']
            )
        _write(path, KeysFile(keys=(*stored.keys, entry)))
    return key


def revoke(path: Path, name: str) -> int:
    """Let a key in no longer; how many are left.

    Raises:
        SettingsError: there is no such key.
    """
    with _alone(path):
        stored = read(path)
        left = tuple(entry for entry in stored.keys if entry.name != name)
        if len(left) == len(stored.keys):
            names = ", ".join(entry.name for entry in stored.keys) or "none"
            raise SettingsError([f'there is no key named "{name}"; there is {names}'])
        _write(path, KeysFile(keys=left))
    return len(left)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two who change the file at once would bring back what one of them revoked."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, file: KeysFile) -> None:
    """In one step, readable by its owner alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text = json.dumps(file.model_dump(by_alias=True, mode="json"), indent=2) + "\n"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """By which a change shows; None where there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError([f"{path} cannot be read ({error}); give the server access to it"]) from error
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: str) -> bytes:
    """In hexadecimal, as keys.json has it."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest().encode()
