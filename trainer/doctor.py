"""`homestill doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.errors import ExportError, HomestillError, RuntimeUnavailable
from trainer.machine import Card, Torch, available_memory, cards, torch_facts
from trainer.runs import Home, Run, free_bytes
from trainer.runtimes.choice import ollama
from trainer.runtimes.ollama import Loaded, Ollama
from trainer.seam import offline

State = Literal["ok", "note", "missing"]
LOW_DISK = 10e9
LOW_MEMORY = 4e9
LOW_VRAM = 0.5
"""Share of a card below which its free memory is worth a word."""
DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest driver for each CUDA version, on Linux (NVIDIA's CUDA compatibility guide, minor-version compatibility)."""
TRAINS_ON_CPU = "training runs on the CPU, for small models only"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `missing` means that a run cannot succeed."""

    name: str
    state: State
    text: str


def _ollama(environment: Mapping[str, str]) -> Ollama | None:
    """Ollama, where the environment names one."""
    named = environment.get("OLLAMA_HOST") or environment.get("HOMESTILL_LOCAL") == "ollama"
    return ollama(environment) if named else None


def unload_models(environment: Mapping[str, str]) -> list[Loaded]:
    """Let Ollama, where the environment names one, give all memory back.

    Raises:
        RuntimeUnavailable: it cannot be reached.
    """
    server = _ollama(environment)
    return server.unload_all() if server else []


def loaded_models(environment: Mapping[str, str]) -> list[Loaded]:
    """What Ollama holds in memory, where one is set up and answers; its absence has a finding of its own."""
    server = _ollama(environment)
    try:
        return server.loaded() if server else []
    except RuntimeUnavailable:
        return []


@dataclass(frozen=True)
class Probes:
    """How the machine is asked; tests give their own."""

    cards: Callable[[], list[Card] | str] = cards
    torch: Callable[[], Torch] = torch_facts
    loaded: Callable[[Mapping[str, str]], list[Loaded]] = loaded_models
    memory: Callable[[], int] = available_memory


def examine(home: Home, environment: Mapping[str, str], probes: Probes | None = None) -> list[Finding]:
    """Look at software, accelerator, runtime, memory, disk and the teacher's key."""
    ask = probes or Probes()
    found = ask.cards()
    return [
        *_software(environment),
        gpu(found, ask.torch(), environment),
        *_runtime(environment),
        *ollama_memory(ask.loaded(environment), found if isinstance(found, list) else []),
        _memory(ask.memory()),
        _disk(home),
        _teacher(environment),
    ]


def examine_task(run: Run) -> list[Finding]:
    """What training this task will take here."""
    from trainer import child, estimate, prepare

    try:
        prepare.choose(run, child.environment(run.environment))
        found = estimate.of(run)
    except HomestillError as error:
        return [Finding("training", "missing", str(error))]
    method, memory, time, disk = (line.partition(": ")[2] for line in found.lines())
    return [
        Finding("training", "ok", f"{found.method} of {found.base}: {method}"),
        Finding("training: memory", "ok" if found.fits else "missing", memory),
        Finding("training: time", "ok", time),
        Finding("training: disk", "ok" if found.disk <= found.disk_free else "missing", disk),
    ]


def gpu(found: list[Card] | str, torch: Torch, environment: Mapping[str, str]) -> Finding:
    """The card, and whether training will use it."""
    if torch.available:
        unsloth = importlib.util.find_spec("unsloth")
        trains = "with Unsloth" if unsloth else "Unsloth is not installed, TRL + PEFT train"
        return Finding("GPU", "ok", f"{torch.name}, {_gb(torch.free)} of {_gb(torch.total)} free, {trains}")
    if isinstance(found, str):
        return _unused(
            f"NVIDIA's driver is installed but does not answer ({found})",
            "reboot, or install the driver again so that it matches the running kernel; "
            "in a container, start it with --gpus all",
        )
    if not found:
        return Finding("GPU", "note", f"none; {TRAINS_ON_CPU}")
    return _unused(*_why_unused(found[0], torch, environment))


def _why_unused(card: Card, torch: Torch, environment: Mapping[str, str]) -> tuple[str, str]:
    """What keeps torch from a card that the driver sees, and the remedy."""
    here = f"{card.name} is here"
    if torch.fault:
        return f"{here}, and torch cannot be loaded ({torch.fault})", "run scripts/install --gpu"
    if torch.cuda is None:
        return f"{here}, and torch {torch.version} is built for CPUs alone", "run scripts/install --gpu"
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"{here}, and CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset that variable"
    oldest = DRIVERS.get(int(torch.cuda.partition(".")[0]), 0)
    major = card.driver.partition(".")[0]
    if major.isdigit() and int(major) < oldest:
        return (
            f"{here}, and its driver {card.driver} is too old for torch's CUDA {torch.cuda}",
            f"install NVIDIA's driver {oldest} or newer",
        )
    return (
        f"{here} with driver {card.driver}, and CUDA {torch.cuda} cannot start on it",
        "restart the machine after a driver update; in a container, start it with --gpus all and "
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    )


def _unused(problem: str, remedy: str) -> Finding:
    return Finding("GPU", "note", f"{problem}: {remedy}. Until then {TRAINS_ON_CPU}")


def ollama_memory(loaded: Sequence[Loaded], found: Sequence[Card]) -> Iterator[Finding]:
    """Ollama's models that hold memory which training needs, or that run where nobody expects it."""
    held = sum(model.vram for model in loaded)
    total = sum(card.total for card in found)
    free = total - sum(card.used for card in found)
    if held and free < LOW_VRAM * total:
        names = [model.name for model in loaded if model.vram]
        yield Finding(
            "Ollama's memory",
            "note",
            f"{', '.join(names)} holds {_gb(held)} of the card's {_gb(total)}, {_gb(free)} are free for training; "
            "unload before you train: homestill doctor --unload",
        )
    for model in loaded if found else ():
        if not model.vram:
            yield Finding(
                "Ollama's speed",
                "note",
                f"{model.name} runs on the CPU although {found[0].name} is here, many times slower than it could; "
                "give Ollama's container the card (--gpus all), look into Ollama's log for CUDA, and restart it",
            )
        elif model.vram < model.size:
            yield Finding(
                "Ollama's speed",
                "note",
                f"{model.name} lies to {model.vram / model.size:.0%} on the card and else in main memory, which "
                "slows every answer; use a smaller student.quantize or student.context, or unload others",
            )


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


def _runtime(environment: Mapping[str, str]) -> Iterator[Finding]:
    from trainer.runtimes.choice import describe

    kind, state, text = describe(environment)
    yield Finding(f"runtime: {kind}", state, text)


def _memory(available: int) -> Finding:
    if available >= LOW_MEMORY:
        return Finding("memory", "ok", f"{_gb(available)} free, {os.cpu_count()} cores")
    text = f"{_gb(available)} free; a 1-billion-parameter base takes about 8 GB to train and 2 GB to serve"
    return Finding("memory", "note", f"{text}: close other programs, or take a smaller base")


def _disk(home: Home) -> Finding:
    home.create()
    free = free_bytes(home.root)
    if free > LOW_DISK:
        return Finding("disk", "ok", f"{_gb(free)} free below {home.root}")
    text = f"{_gb(free)} free below {home.root}; a 1-billion-parameter base takes about 13 GB while it is exported"
    return Finding("disk", "note", f"{text}: free some space, or set HOMESTILL_HOME to a larger disk")


def _teacher(environment: Mapping[str, str]) -> Finding:
    if offline(environment):
        return Finding("teacher", "note", "HOMESTILL_OFFLINE is set: no teacher client is ever made")
    keys = sorted(name for name in environment if name.endswith(("_API_KEY", "_API_KEY_FILE")))
    if keys:
        return Finding("teacher", "ok", f"keys in {', '.join(keys)}")
    return Finding("teacher", "note", "no *_API_KEY variable is set; a hosted teacher will need one")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
