"""The benchmarks run; what they measure is in docs/benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import ExportError
from trainer.export import converter

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"

pytestmark = pytest.mark.slow


def run(name: str, *options: str) -> str:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, BENCH / name, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(printed: str, row: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.timeout(600)
def test_train_measures_ours_beside_trl_and_dspys_recipe() -> None:
    printed = run("train", "--quick", "--only", "plain TRL,ours,DSPy")
    computed = {name: int(cells(printed, name)[4].rstrip("%")) for name in ("plain TRL", "ours")}
    assert computed["plain TRL"] >= 100  # padding included
    assert computed["ours"] < 75  # the prefix once for four rows
    losses = [float(cells(printed, name)[6]) for name in ("plain TRL", "ours", "DSPy's local recipe")]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.2)


def test_qlora_is_left_out_with_its_reason_where_there_is_no_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert "needs CUDA" in run("train", "--method", "qlora")


@pytest.mark.timeout(600)
def test_export_makes_the_tensors_of_llama_cpps_own_scripts() -> None:
    try:
        converter(os.environ)
    except ExportError as missing:
        pytest.skip(str(missing))
    printed = run("export", "--quick", "--quantize", "q8_0")
    assert "12 of 12 tensors are equal byte for byte" in printed
