"""What happens on a host without a network, as one program: install, serve, train again from what was carried.

Run inside a network namespace of its own by test_offline.py: BUNDLE KEY HOME QUESTIONS. Prints JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.small_day import ROOT, Messages, ask, endpoint

SIOCGIFFLAGS, SIOCSIFFLAGS, UP = 0x8913, 0x8914, 0x1


def main() -> int:
    bundle, key, home, file = sys.argv[1:5]
    loopback_up()
    questions = json.loads(Path(file).read_text("utf-8"))
    call("trainer.bundle", "load", bundle, "--trust", key, "--home", home, "--no-images")
    carried = current(home)
    answers = served(questions)
    call("trainer", "run", str(Path(home) / "tasks" / "tickets"), "--force")
    found = {"carried": carried, "trained": current(home), "answers": answers, "again": served(questions)}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 0)
        (flags,) = struct.unpack("16xh", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | UP))


def call(module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{module} {arguments[0]} ended with {done.returncode}")


def current(home: str) -> str:
    return (Path(home) / "releases" / "tickets" / "current").read_text("utf-8").strip()


def served(questions: list[Messages]) -> list[dict[str, Any]]:
    with endpoint(os.environ) as url:
        return ask(url, questions)


if __name__ == "__main__":
    assert "HOMESTILL_HOME" in os.environ
    sys.exit(main())
