"""What the train stage settles before anything is trained: the method, the rows, the estimate.

What needs no rows is also asked by preflight, so that nothing is paid for what could not be trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import estimate, gpu
from trainer.conversion import families
from trainer.errors import TrainError
from trainer.runs import Run, read_jsonl, write_jsonl
from trainer.runtimes.choice import choice
from trainer.settings import StudentSettings
from trainer.task import Task
from trainer.template import Template
from trainer.training import base as bases
from trainer.training import chats, methods, prompt, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("homestill.train")


class Prepared(NamedTuple):
    """What is known before the training starts."""

    about: dict[str, Any]
    """The summary so far."""
    spec: dict[str, Any]
    """What the child is told."""
    expected: estimate.Estimate


class Chosen(NamedTuple):
    """What the task's method makes of the base, whatever the rows."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    template: Template
    modules: list[str]
    """Linear layers that get an adapter."""
    soft: dict[str, int]
    """Of a soft prompt, its first token's id and how many there are."""


def choose(run: Run, environment: Mapping[str, str]) -> Chosen:
    """Bring the method, the base and this machine together. Nothing is trained or written.

    Raises:
        PreflightError: a GPU is required, and torch can use none.
        TrainError: they do not go together, or student.train.replay names no file.
        DataError: the lines of student.train.replay are not conversations.
        TemplateError: the chat template cannot be frozen, or carries no soft prompt.
        DiskError: the base has to be downloaded and does not fit.
    """
    gpu.check(run.environment)
    base = bases.resolve(run)
    _refuse(run, base, environment)
    chosen = fit(run.task.settings.student, base)
    if run.task.settings.student.train.replay:
        chats.read(replay_file(run.task))
    return chosen


def fit(student: StudentSettings, base: Path) -> Chosen:
    """Bring the method and the base together, whatever the machine.

    Raises:
        TrainError: they do not go together.
        TemplateError: the chat template cannot be frozen, or carries no soft prompt.
    """
    from transformers import AutoTokenizer

    families.check(base, student.context)
    if student.method == "prompt" and (reason := prompt.refusal(bases.model_type(base))):
        raise TrainError(reason)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if student.method == "prompt":
        template = prompt.extend(tokenizer, student.train.prompt_tokens)
        first = tokenizer.convert_tokens_to_ids(prompt.names(1)[0])
        return Chosen(base, tokenizer, template, [], {"first": first, "count": student.train.prompt_tokens})
    adapted = methods.KEPT[student.method] == "adapter"
    modules = methods.target_modules(base, student.train.target_modules) if adapted else []
    return Chosen(base, tokenizer, Template.freeze(tokenizer), modules, {})


def prepare(run: Run, environment: Mapping[str, str]) -> Prepared:
    """Tokenize the rows into the work folder, and say what the training will take.

    Args:
        environment: of the training process.

    Raises:
        PreflightError: a GPU is required, and torch can use none.
        TrainError: the method, the base and this machine do not go together, or no row fits.
        DiskError: weights and checkpoints would not fit.
    """
    student, work = run.task.settings.student, run.stage("train") / "work"
    chosen = choose(run, environment)
    if chosen.soft:
        prompt.write_tokenizer(chosen.tokenizer, chosen.base, work / "tokenizer")
    found = _rows(run, chosen)
    write_jsonl(work / "train.jsonl", list(found.train))
    write_jsonl(work / "eval.jsonl", list(found.evaluate))
    expected = estimate.of(run)
    run.need_disk(expected.disk, "training")
    about = {
        "backend": methods.choose_backend(
            student.method, environment, bases.model_type(chosen.base), dora=student.train.dora
        ),
        "method": student.method,
        "base": student.base,
        "base_sha256": bases.sha256(chosen.base),
        "template_sha256": chosen.template.sha256,
        "rows": len(found.train),
        "replayed_rows": found.replayed,
        "eval_rows": len(found.evaluate),
        "dropped_too_long": found.too_long,
        "tokens": found.tokens,
    }
    spec = _spec(run, chosen, backend=str(about["backend"]), count=len(found.train), expected=expected)
    log.warning(
        "training (%s, %s) of %s: %d rows (%d of general data), %d held back, %d left out as too long; "
        "%d tokens, %d steps",
        *(student.method, about["backend"], student.base, len(found.train), found.replayed),
        *(len(found.evaluate), found.too_long, found.tokens, spec["steps"]),
    )
    log.warning("%s", "\n".join(expected.lines()))
    return Prepared(about, spec, expected)


def _refuse(run: Run, base: Path, environment: Mapping[str, str]) -> None:
    """Raise TrainError where this machine cannot train by the method, or its runtime not serve the base."""
    student, model_type = run.task.settings.student, bases.model_type(base)
    reasons = [methods.refusal(student.method, environment)]
    if model_type in families.ENCODER_DECODERS and (runtime := choice(run.environment)) != "embedded":
        reasons.append(
            f"student.base is {student.base!r}, an encoder-decoder, which {runtime} does not serve; "
            "set HOMESTILL_LOCAL to embedded, or use a base of another family"
        )
    if found := [reason for reason in reasons if reason]:
        raise TrainError("\n".join(found))


def replay_file(task: Task) -> Path:
    """Where the general data of student.train.replay lies.

    Raises:
        TrainError: nowhere.
    """
    replay = task.settings.student.train.replay
    assert replay
    file = task.folder / Path(replay.data).expanduser()
    if not file.is_file():
        raise TrainError(f"student.train.replay.data names {file}, which does not exist; correct the path")
    return file


def _spec(
    run: Run, chosen: Chosen, *, backend: str, count: int, expected: estimate.Estimate
) -> dict[str, Any]:
    student, folder = run.task.settings.student, run.stage("train")
    return {
        "base": str(chosen.base),
        "tokenizer": str(folder / "work" / "tokenizer" if chosen.soft else chosen.base),
        "method": student.method,
        "backend": backend,
        "settings": student.train.model_dump(),
        "modules": chosen.modules,
        "soft": chosen.soft,
        "steps": rows.steps(count, student.train),
        "step_rows": student.train.step_rows,
        "rows_at_once": expected.rows_at_once,
        "seed": run.task.settings.seed,
        "pad": rows.pad_id(chosen.tokenizer),
        "metrics": str(folder / "metrics.jsonl"),
        "template": chosen.template.to_json(),
    }


def _rows(run: Run, chosen: Chosen) -> rows.Rows:
    recipe, seed = run.task.settings.student.train, run.task.settings.seed
    conversations = read_jsonl(run.folder / "curate" / "train.jsonl")
    found = rows.tokenize(conversations, chosen.tokenizer, chosen.template, recipe, seed)
    if not recipe.replay:
        return found
    general = replay_file(run.task)
    mixed = rows.with_replay(found, general, chosen.tokenizer, chosen.template, settings=recipe, seed=seed)
    share = mixed.replayed / len(mixed.train)
    if share < recipe.replay.share - 0.01:
        log.warning(
            "%s holds enough for %.0f %% of the rows, student.train.replay.share is %.0f %%",
            *(recipe.replay.data, 100 * share, 100 * recipe.replay.share),
        )
    return mixed
