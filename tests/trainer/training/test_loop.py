"""Early stopping, and what a kill leaves behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import tiny_run
from tests.trainer.training.support import curve, prepared
from trainer import train
from trainer.errors import TrainError
from trainer.runs import read_jsonl, write_json, write_jsonl
from trainer.training import checkpoints, loop


def test_full_training_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, method="full", train="epochs: 40, eval_steps: 2, patience: 2, learning_rate: 0.5"
    )
    spec, work = prepared(run)
    result = loop.train(spec, work)
    assert result["stopped_early"]
    assert result["steps"] == result["best_step"] + 4
    assert result["trainable_parameters"] == result["parameters"]
    kept = load_file(work / "weights" / "model.safetensors")
    best = load_file(work / "checkpoints" / f"checkpoint-{result['best_step']}" / "model.safetensors")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    # killed before the result was written: nothing is trained again
    assert loop.train(spec, work) == result


def test_a_training_that_diverges_says_so_and_keeps_no_weights(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, method="full", train="epochs: 2, eval_steps: 2")
    spec, work = prepared(run)
    spec["settings"]["weight_decay"] = math.inf  # the settings refuse it; a learning rate may do the same
    result = loop.train(spec, work)
    assert result["best_step"] is None
    assert math.isnan(curve(work)[-1][1])
    assert not (work / "weights").exists()
    write_json(work / "result.json", result)
    with pytest.raises(TrainError, match=r"diverged.*; lower student.train.learning_rate, which is 0.0002"):
        train.run(run)


def test_half_written_checkpoints_and_metrics_that_ran_ahead_are_dropped(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 15:
            (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()
    metrics = tmp_path / "metrics.jsonl"
    write_jsonl(metrics, [{"step": step, "loss": 1.0, "seconds": step / 2} for step in range(1, 13)])
    with open(metrics, "a") as file:
        file.write('{"step": 13, "lo')
    assert checkpoints.trim_metrics(metrics, 10) == 5.0
    assert [row["step"] for row in read_jsonl(metrics)] == list(range(1, 11))
    assert checkpoints.trim_metrics(metrics, 0) == 0.0
    assert metrics.read_text() == ""
