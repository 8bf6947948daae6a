"""What a killed training left: complete checkpoints, half-written ones, and metrics that ran ahead."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.runs import read_json, write_text

COMPLETE = "complete"
"""A file that is written into a checkpoint when all else is."""


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; what a kill left half-written is removed."""
    found: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            found[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return found[max(found)] if found else None


def trim_metrics(path: Path, step: int) -> float:
    """Forget the rows after `step`, which will be trained again. Returns the seconds spent up to there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last line
    kept = [row for row in rows if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return float(kept[-1]["seconds"]) if kept else 0.0


def finished(checkpoint: Path, spec: dict[str, Any]) -> bool:
    """Whether training ended at this checkpoint: all steps are made, or patience ran out."""
    state = read_json(checkpoint / "trainer_state.json")
    stopping = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
    worse = stopping["early_stopping_patience_counter"]
    return bool(state["global_step"] >= spec["steps"] or worse >= spec["settings"]["patience"])


def keep_weights(best: Path, out: Path) -> None:
    """Copy the best checkpoint's weights and configuration, without optimizer and random state."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in best.iterdir():
        if file.suffix == ".safetensors" or file.name in ("config.json", "adapter_config.json"):
            shutil.copyfile(file, partial / file.name)
    for index in best.glob("*.safetensors.index.json"):
        shutil.copyfile(index, partial / index.name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
