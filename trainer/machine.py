"""What this machine trains on: its name, its memory and its speed, found out without holding the card.

A process that asks CUDA anything keeps some hundred megabytes of the card until it ends, so torch is asked in
a process of its own, and only where NVIDIA's driver is installed at all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer import process

CUDA_FACTS = """
import json, time, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if facts["available"]:
    free, total = torch.cuda.mem_get_info()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16 if torch.cuda.get_device_capability()[0] < 8
                    else torch.bfloat16)
    for _ in range(3): a @ a
    torch.cuda.synchronize(); began = time.perf_counter()
    for _ in range(10): a @ a
    torch.cuda.synchronize()
    facts |= {"name": torch.cuda.get_device_name(), "total": total, "free": free,
              "flops": 20 * 4096 ** 3 / (time.perf_counter() - began)}
print(json.dumps(facts))
"""
SMI = ("--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits")
SIDE = 1024
"""Of the matrices that a CPU is tried with; larger than its caches, and still done in milliseconds."""

Tool = Callable[[Sequence[str], float], process.Done]
"""Runs a program for at most so many seconds."""


def tool(words: Sequence[str], timeout: float) -> process.Done:
    """Run a program; one that is not there ends with code 127."""
    try:
        return process.run(words, timeout=timeout)
    except (OSError, subprocess.SubprocessError) as error:
        return process.Done(list(words), 127, str(error))


@dataclass(frozen=True)
class Torch:
    """The torch that is installed."""

    version: str
    cuda: str | None
    """The CUDA version that it was built for; None: for CPUs alone."""
    available: bool
    name: str = ""
    total: int = 0
    free: int = 0
    flops: float = 0.0
    fault: str = ""
    """Why it could not be asked."""


@dataclass(frozen=True)
class Card:
    """A GPU as NVIDIA's driver describes it; memory in bytes."""

    name: str
    total: int
    used: int
    driver: str


def torch_facts(run: Tool = tool) -> Torch:
    """Ask torch in a process of its own."""
    done = run([sys.executable, "-c", CUDA_FACTS], 300.0)
    if done.code:
        return Torch("", None, available=False, fault=done.last_line)
    found: dict[str, Any] = json.loads(done.last_line)
    return Torch(**found)


def cards(run: Tool = tool) -> list[Card] | str:
    """The GPUs that the driver sees, or what it said instead; empty where there is no driver."""
    done = run(["nvidia-smi", *SMI], 60.0)
    if done.code == 127:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.output.splitlines() if line.strip()]
    if done.code or not all(len(row) == 4 for row in rows):
        return done.last_line
    return [Card(name, _mib(total), _mib(used), driver) for name, total, used, driver in rows]


@dataclass(frozen=True)
class Machine:
    """Where a training runs."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: int
    """Bytes: of the card, or of the machine."""
    free: int
    flops: float
    """Operations a second in a large matrix product, as training would make it."""

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    @classmethod
    def here(cls, environment: Mapping[str, str], facts: Callable[[], Torch] = torch_facts) -> Machine:
        """This machine: the first GPU that torch can use, or the CPU."""
        if shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath)):
            found = facts()
            if found.available:
                return cls("cuda", found.name, found.total, found.free, found.flops)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        name = f"this CPU ({os.cpu_count()} cores)"
        return cls("cpu", name, total, available_memory(), cpu_flops())


def cpu_flops(clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of a product of float32 matrices on all cores; the best of three."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)

    def once() -> float:
        began = clock()
        matrix @ matrix
        return clock() - began

    return 2.0 * SIDE**3 / max(min(once() for _ in range(3)), 1e-9)


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping, file caches included where the kernel tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mib(text: str) -> int:
    """nvidia-smi's number of MiB; it says [N/A] of some cards."""
    return int(text) * 1024 * 1024 if text.isdigit() else 0
