"""Notes every attempt of Python's own sockets to reach or look up an address. Standard library alone.

`folder_for(log)` gives a folder whose `sitecustomize.py` does so in every Python process that has it on
PYTHONPATH. What native code does on its own is not seen here: a network namespace stops that, strace shows it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONNECTS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def install(log: str) -> None:
    """From now on, append a JSON line {"event", "to", "local", "program"} to `log` for every attempt."""
    sys.addaudithook(hook(log))


def hook(log: str) -> Callable[[str, tuple[Any, ...]], None]:
    def noted(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CONNECTS:
            target = arguments[1]
        elif event in LOOKUPS:
            target = arguments[0]
        else:
            return
        if target is None and event != "socket.getaddrinfo":
            return  # a socket that was connected before, and noted then
        line = {
            "event": event,
            "to": str(target),
            "local": is_local(target),
            "program": " ".join(sys.argv[:3]),
        }
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)

    return noted


def is_local(target: Any) -> bool:
    """Whether a socket's address, or a name that is looked up, is this machine itself."""
    if isinstance(target, tuple) and target and isinstance(target[0], (str, bytes)):
        target = target[0]
    if target in (None, "", b"") or isinstance(target, tuple):  # the wildcard, or the kernel's own sockets
        return True
    name = os.fsdecode(target) if isinstance(target, bytes) else str(target)
    if name.startswith(("/", "\0")) or name in ("localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def folder_for(log: Path, folder: Path) -> Path:
    """Write a `sitecustomize.py` into `folder` that installs the hook; put that folder first on PYTHONPATH."""
    source = Path(__file__).read_text(encoding="utf-8")
    (folder / "sitecustomize.py").write_text(f"{source}\n\ninstall({str(log)!r})\n", encoding="utf-8")
    return folder


def attempts(log: Path) -> list[dict[str, Any]]:
    """What was noted, in order."""
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
