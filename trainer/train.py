"""Train: fine-tune the base on the curated conversations, then merge into 16-bit weights.

The rows are tokenized here, the training and the merge run in processes of their own. What is learned
is the answer with its end-of-turn token. Everything under `work/` survives a kill and is taken up again.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from trainer import child, prepare, process
from trainer.errors import TrainError
from trainer.progress import Advance, progress
from trainer.runs import Run, read_json, sha256_file, write_json
from trainer.training import base as bases
from trainer.training import launch, methods
from trainer.training.checkpoints import last_checkpoint

log = logging.getLogger("homestill.train")

UNSLOTH_QUIET = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_AUTO_INSTALL": "0"}


def inputs(run: Run) -> dict[str, Any]:
    """What the weights depend on."""
    settings = run.task.settings
    recipe = settings.student.train
    replay = {"replay": sha256_file(prepare.replay_file(run.task))} if recipe.replay else {}
    return {
        "rows": sha256_file(run.folder / "curate" / "train.jsonl"),
        "base": bases.sha256(bases.resolve(run)),
        "method": settings.student.method,
        "train": recipe.model_dump(exclude={"processes"}),
        "seed": settings.seed,
        "versions": bases.versions("torch", "transformers", "trl", "peft"),
        **replay,
    }


def run(run: Run) -> None:
    """Write train/model, train/adapter (lora, qlora), train/metrics.jsonl and train/summary.json.

    Raises:
        TrainError: the base cannot be used, no row fits, the machine lacks something, or the training failed.
        DiskError: weights and checkpoints would not fit.
    """
    folder, recipe = run.stage("train"), run.task.settings.student.train
    work = folder / "work"
    if (folder / "summary.json").exists():  # only the work's removal, or the pipeline's record, was lost
        shutil.rmtree(work, ignore_errors=True)
        return
    work.mkdir(exist_ok=True)
    environment = launch.environment(run.environment, recipe.processes) | UNSLOTH_QUIET
    about, spec, expected = prepare.prepare(run, environment)
    write_json(work / "spec.json", spec)
    if not (work / "result.json").exists():
        count = launch.processes(recipe.processes, environment)
        words = launch.words(work / "spec.json", count, run.environment)
        last = last_checkpoint(work / "checkpoints")
        done = int(last.name.rpartition("-")[2]) if last else 0
        with progress("training", spec["steps"], done) as advance:
            _run_child(run, words, environment, _Reporter(advance, done))
    measured = read_json(work / "result.json")
    if measured["best_step"] is None:
        raise TrainError(
            "training diverged, no evaluation loss was finite; lower student.train.learning_rate, "
            f"which is {recipe.learning_rate:g}, and run again; the losses are in {folder / 'metrics.jsonl'}"
        )
    _merge(run, work)
    if methods.KEPT[spec["method"]] == "adapter":
        shutil.copytree(work / "adapter", work / "copy", dirs_exist_ok=True)  # a rerun merges the original
        _adopt(work / "copy", folder / "adapter")
    compared = expected.compared(measured)
    log.warning("%s", _said(compared, measured["seconds"]))
    write_json(folder / "summary.json", about | measured | {"estimate": compared})
    shutil.rmtree(work)


def _merge(run: Run, work: Path) -> None:
    words = process.module("trainer.training.merge", work / "spec.json")
    _run_child(run, words, child.environment(run.environment), _Reporter(lambda *_: None, 0))
    _adopt(work / "merged", work.parent / "model")


def _said(compared: dict[str, Any], seconds: float) -> str:
    """The estimate beside what was measured, for a person."""
    text = f"memory: {compared['measured_peak_bytes'] / 1e9:.2f} GB at most, {compared['memory_bytes'] / 1e9:.2f} GB expected"
    return f"{text}; time: {seconds:.0f} s, {compared['seconds']:.0f} s expected"


class _Reporter:
    """Shows a child's events."""

    def __init__(self, advance: Advance, step: int) -> None:
        self._advance = advance
        self._step = step
        self._evaluated = ""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            log.warning(
                "%(trainable_parameters)d of %(parameters)d parameters are trained, on %(device_name)s", event
            )
        elif event["event"] == "evaluated":
            self._evaluated = f", evaluation loss {event['eval_loss']:.4f}"
        elif event["event"] == "progress":
            note = f"loss {event['loss']:.4f}{self._evaluated}, {event['tokens_per_s']} tokens/s"
            self._advance(event["step"] - self._step, note)
            self._step = event["step"]


def _run_child(run: Run, words: list[str], environment: dict[str, str], report: _Reporter) -> None:
    work = run.stage("train") / "work"
    log_file = work.parent / "train.log"
    before = log_file.stat().st_size if log_file.exists() else 0
    code = child.run(words, folder=work, log=log_file, environment=environment, report=report, stop=run.stop)
    run.go_on()
    if code:
        module = next(word for word in reversed(words) if word.startswith("trainer."))
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        said = launch.reason(log_file.read_bytes()[before:].decode(errors="replace"))
        raise TrainError(
            f"{module} {ended}: {said}; the log is {log_file} "
            "(where memory was short, lower student.train.batch_size or max_length)"
        )


def _adopt(made: Path, place: Path) -> None:
    """Move a finished folder to its place, in one step where none stands there."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(made, place)
