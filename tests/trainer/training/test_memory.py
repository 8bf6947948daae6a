"""The peak of memory is the process's own."""

from __future__ import annotations

import subprocess
import sys

ASK = "from trainer.training.memory import peak_bytes; print(peak_bytes(False))"


def test_what_the_starting_process_holds_is_not_counted() -> None:
    held = b"x" * 1_500_000_000  # all pages are written, so the kernel has counted them for this process

    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)

    del held
    assert 50_000_000 < int(done.stdout) < 1_500_000_000
