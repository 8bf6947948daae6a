"""What running out of memory looks like, and how much was held."""

from __future__ import annotations

from pathlib import Path

import torch

LIKE_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""What the messages of CUDA's, cuBLAS's and the CPU's allocators contain."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LIKE_OUT_OF_MEMORY)


def peak_bytes(cuda: bool) -> int:
    """The most memory that this process has held: the GPU's where there is one.

    Not `ru_maxrss`, which begins with what the process held that this one was started from.
    """
    if cuda:
        return int(torch.cuda.max_memory_reserved())
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024
