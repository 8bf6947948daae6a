"""External programs: one wrapper with argument list, timeout, clean environment and a result object."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",  # importing litellm asks the network otherwise
    "GOMP_SPINCOUNT": "10000",  # threads that spin while they wait take ten times as long on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
}


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    args: list[str]
    code: int
    output: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code} without a message"


def run(
    args: Sequence[str | Path],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Done:
    """Run a program to its end, its output kept; a timeout kills it and counts as code 124."""
    words = [str(arg) for arg in args]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            env=dict(environment) if environment is not None else None,
            cwd=folder,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as late:
        output = late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
        return Done(words, 124, f"{output}\ntimed out after {timeout:g} s")
    return Done(words, done.returncode, done.stdout)


def module(name: str, *args: str | Path) -> list[str]:
    """The argument list that runs one of our own modules in a Python process of its own."""
    return [
        sys.executable,
        "-P",
        "-m",
        name,
        *(str(arg) for arg in args),
    ]  # -P: never a module of the folder we are in


def on_parent_death(action: Callable[[], None]) -> None:
    """Call `action` when the parent is gone: it holds the other end of our standard input.

    Works where the parent gave a pipe as standard input, whatever killed it, on every POSIX system.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        action()

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
