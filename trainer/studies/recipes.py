"""A task of a study's own: what is trained and on what prompts, without touching the task's runs.

Each weights step is a run of the ordinary stages, up to register, below the study's folder. Its task is
the user's own with four changes: no optimizer (the program's prompts are given), the training split as
the task has it, of the other splits only the prompts that parity is proven on, and where the prompts are not
as written, room to train on whatever the model's context holds.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from trainer import capture, pipeline, prepare, task
from trainer import program as programs
from trainer.data import Example
from trainer.errors import TrainError
from trainer.pipeline import Stage
from trainer.program import Program
from trainer.register import REPLAYED
from trainer.runs import Run, read_json, sha256_json, write_json, write_jsonl
from trainer.runtimes.local import Registration, recorded
from trainer.splits import assigned
from trainer.studies.study import Study, with_context
from trainer.task import Task
from trainer.teacher.quote import prompts

log = logging.getLogger("homestill.study")

Execute = Callable[[Run, Sequence[Stage]], list[str]]
"""Brings stages up to date, as `pipeline.execute` does."""
STAGES = ("curate", "train", "export", "register")


def examples(run: Run) -> list[Example]:
    """What the teacher answers for a weights step: the training split, and the prompts of parity."""
    splits = assigned(run.task).splits
    return [*splits["train"], *splits["calibrate"][:REPLAYED]]


def derived(study: Study, state: dict[str, Any]) -> Task:
    """The study's own task folder, written anew from the user's, for a program in this state."""
    folder, source = study.folder / "task", study.run.task
    if folder.exists():
        shutil.rmtree(folder)
    home = study.run.home.root.resolve()
    shutil.copytree(
        source.folder, folder, copy_function=_link, ignore=lambda at, names: _left_out(Path(at), names, home)
    )
    splits = assigned(source).splits
    for split, rows in {"train": splits["train"], "calibrate": splits["calibrate"][:REPLAYED]}.items():
        write_jsonl(folder / "study" / f"{split}.jsonl", [example.values for example in rows])
    (folder / "study" / "test.jsonl").write_text("", encoding="utf-8")
    (folder / "task.yaml").write_text(
        yaml.safe_dump(_settings(study, state), sort_keys=False), encoding="utf-8"
    )
    return task.load(folder)


def train(study: Study, name: str, state: dict[str, Any], execute: Execute) -> Run:
    """Fine-tune the base on the teacher's answers to the program in this state.

    Args:
        name: of the run's folder below the study's.
        state: of the program whose prompts the teacher answers, as DSPy saves it.
        execute: runs the stages.

    Raises:
        HomestillError: as the stages do; run again, it goes on from there.
    """
    own = derived(study, state)
    folder = study.folder / "runs" / f"{name}-{sha256_json([pipeline.run_name(own), state])[:8]}"
    run = replace(study.run, task=own, folder=folder, force=True)
    execute(run, [captured(state), *map(pipeline.stage, STAGES)])
    return run


def captured(state: dict[str, Any]) -> Stage:
    """The capture stage with the program's state given instead of optimized."""

    def start(run: Run) -> None:
        file = run.stage("capture") / "program.json"
        write_json(file, state)
        grown = programs.load(run.task, file)
        if state != programs.load(run.task).state:
            require_room(run, grown)
        capture.run(run)

    return Stage("capture", lambda run: capture.inputs(run) | {"state": sha256_json(state)}, start)


def require_room(run: Run, grown: Program) -> None:
    """Look, before the teacher is paid, whether prompts that have grown leave room for an answer to train on.

    Raises:
        TrainError: fewer than two examples do.
    """
    chosen, student = prepare.choose(run, run.environment), run.task.settings.student
    most = student.context  # never more than student.train.max_length here
    rows = [
        [len(chosen.template.prompt_ids(chosen.tokenizer, messages)) for messages in prompts(grown, example)]
        for example in assigned(run.task).splits["train"]
    ]
    fitting = sum(min(lengths) < most for lengths in rows)
    longest = max(map(max, rows))
    if longest < most:
        return
    said = (
        f"the optimised prompts of {fitting} of {len(rows)} training examples fit into the models' context, {most} tokens; "
        f"--context {longest + student.max_tokens} holds them all with their answers"
    )
    if fitting < 2:
        raise TrainError(f"{said}; at least 2 are needed, and the teacher was not asked yet")
    log.warning("%s", said)


def student(study: Study, run: Run) -> Registration:
    """The model that a run registered, with the study's context."""
    return with_context(recorded(run.folder)["model"], study.context)


def spent(run: Run) -> tuple[float, float]:
    """US dollars of the teacher's answers that `examples` names, whenever they were bought, and seconds.

    The task's own run asked for calibrate and test as well, which no weights step needs: their dollars are left
    out, and so is their share of the capture's seconds.
    """
    captured, asked = read_json(run.folder / "capture" / "summary.json"), examples(run)
    answers = run.store.answers(captured["system"])
    dollars = sum(answers[example.id].cost_usd for example in asked)
    capturing = seconds(run, ["capture"]) * len(asked) / captured["examples"]
    return dollars, capturing + seconds(run, STAGES)


def seconds(run: Run, stages: Sequence[str]) -> float:
    """Wall time of finished stages."""
    records = (read_json(run.folder / name / "stage.json") for name in stages)
    return sum(float(record.get("seconds", 0.0)) for record in records)


def _settings(study: Study, state: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = study.run.task.settings.model_dump(mode="json", exclude_none=True)
    settings["data"] = {split: f"study/{split}.jsonl" for split in ("train", "calibrate", "test")}
    settings["teacher"]["optimizer"] = "none"
    student = settings["student"]
    student["base"] = study.run.task.base_path()
    if "replay" in student["train"]:
        student["train"]["replay"]["data"] = str(prepare.replay_file(study.run.task).resolve())
    student["context"] = study.context or student["context"]
    if state != study.program().state:  # the prompts may have grown: what can be answered is trained on
        student["train"]["max_length"] = max(student["train"]["max_length"], student["context"])
    return settings


def _left_out(folder: Path, names: list[str], home: Path) -> list[str]:
    """Hidden files, what is written anew, and Homestill's home where it lies in the task's folder."""
    return [
        name
        for name in names
        if name.startswith(".")
        or name in ("task.yaml", "__pycache__")
        or home.is_relative_to((folder / name).resolve())
    ]


def _link(source: str, target: str) -> None:
    os.symlink(Path(source).resolve(), target)
