"""`homestill doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ExportError
from trainer.runs import Home, free_bytes
from trainer.teacher.client import offline

State = Literal["ok", "note", "missing"]
LOW_DISK = 10e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `missing` means that a run cannot succeed."""

    name: str
    state: State
    text: str


def examine(home: Home, environment: Mapping[str, str]) -> list[Finding]:
    """Look at the software, the accelerator, the runtime, the disk and the teacher's key."""
    return [*_software(environment), _gpu(), *_runtime(environment), _disk(home), _teacher(environment)]


def _software(environment: Mapping[str, str]) -> Iterator[Finding]:
    from trainer.export import converter

    for package in ("dspy", "torch", "transformers", "trl", "peft", "llama-cpp-python"):
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "missing", "not installed; run scripts/install")
    try:
        yield Finding("converter", "ok", str(converter(environment)))
    except ExportError as error:
        yield Finding("converter", "missing", str(error))


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        text = (
            "an NVIDIA driver is here but torch cannot use it; install a CUDA build of torch"
            if driver
            else "none"
        )
        return Finding("GPU", "note", f"{text}; training runs on the CPU, for small models only")
    name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    unsloth = (
        "with Unsloth"
        if importlib.util.find_spec("unsloth")
        else "Unsloth is not installed, TRL + PEFT train"
    )
    return Finding("GPU", "ok", f"{name}, {total / 1e9:.0f} GB, {unsloth}")


def _runtime(environment: Mapping[str, str]) -> Iterator[Finding]:
    from trainer.runtimes.choice import describe

    kind, state, text = describe(environment)
    yield Finding(f"runtime: {kind}", state, text)


def _disk(home: Home) -> Finding:
    home.root.mkdir(parents=True, exist_ok=True)
    free = free_bytes(home.root)
    state: State = "ok" if free > LOW_DISK else "note"
    return Finding("disk", state, f"{free / 1e9:.0f} GB free below {home.root}")


def _teacher(environment: Mapping[str, str]) -> Finding:
    if offline(environment):
        return Finding("teacher", "note", "HOMESTILL_OFFLINE is set: no teacher client is ever made")
    keys = sorted(name for name in environment if name.endswith(("_API_KEY", "_API_KEY_FILE")))
    if keys:
        return Finding("teacher", "ok", f"keys in {', '.join(keys)}")
    return Finding("teacher", "note", "no *_API_KEY variable is set; a hosted teacher will need one")
