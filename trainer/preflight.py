"""What later stages need, looked at before the first call is paid for; what a task alone decides, by `check` too."""

from __future__ import annotations

import re
from collections.abc import Callable

from trainer import child, estimate, prepare, program
from trainer.conversion import adapter as adapters
from trainer.errors import ExportError, HomestillError, PreflightError
from trainer.export import SCRIPT, converter
from trainer.runs import Home, Run
from trainer.runtimes.choice import describe
from trainer.sources import sources
from trainer.splits import MIN_SEALED, assigned
from trainer.task import Task
from trainer.training import base as bases
from trainer.training import chats


def check(run: Run) -> None:
    """Find the base (downloaded if need be), what its method needs, the converter and the local runtime.

    Raises:
        PreflightError: with everything that is missing; nothing has been spent.
    """
    task = run.task

    def trained() -> list[str]:
        prepare.choose(run, child.environment(run.environment))
        return _too_large(run)

    faults = [*of_task(task, force=run.force), *_of_base(task, trained)]
    try:
        apart = task.settings.student.deliver == "adapter"
        converter(run.environment, SCRIPT, *([adapters.SCRIPT] if apart else []))
    except ExportError as error:
        faults.append(str(error))
    _, state, text = describe(run.environment)
    if state == "missing":
        faults.append(text)
    if faults:
        raise PreflightError([*dict.fromkeys(faults), "nothing was asked of the teacher yet"])


def without_network(task: Task, home: Home, *, force: bool = False) -> bool:
    """Find what is wrong with a task on any machine; its base is looked at where it lies here already.

    Args:
        force: as of `of_task`.

    Returns:
        Whether it does.

    Raises:
        PreflightError: with every fault.
    """
    known = True

    def fits() -> list[str]:
        nonlocal known
        base = bases.at_hand(task, home.cache)
        known = base is not None
        if base:
            prepare.fit(task.settings.student, base)
        return []

    if faults := [*of_task(task, force=force), *_of_base(task, fits)]:
        raise PreflightError(faults)
    return known


def of_task(task: Task, *, force: bool = False) -> list[str]:
    """Faults of rows, code and general data, whatever the machine.

    Args:
        force: go on with splits that are too small, and with a `curate.balance` that is not found.
    """
    faults: list[str] = []
    for look in (_data, _code, _general):
        try:
            faults += look(task, force)
        except HomestillError as error:
            faults += str(error).splitlines()
    return faults


def _of_base(task: Task, look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except HomestillError as error:
        return str(error).splitlines()
    except (OSError, ValueError) as error:  # transformers on a folder without a usable tokenizer
        return [f"student.base is {task.settings.student.base!r}: its tokenizer cannot be loaded ({error})"]


def _data(task: Task, force: bool) -> list[str]:
    """Splits that curate would refuse however good the answers were."""
    sizes = {split: len(rows) for split, rows in assigned(task).splits.items()}
    needed = {"train": task.settings.curate.min_examples, "calibrate": MIN_SEALED, "test": MIN_SEALED}
    return [
        f"the {split} split holds {sizes[split]} examples, {least} are needed; add data, or go on with --force"
        for split, least in needed.items()
        if sizes[split] < least and not force
    ]


def _code(task: Task, force: bool) -> list[str]:
    """A program that release could not carry, or whose outputs curate could not balance by.

    The program may return fields that no predictor has, so one is unknown only where no source names it either.
    """
    loaded, field = program.load(task), task.settings.curate.balance
    files = sources(task.folder, [task.source("program")[0], task.source("metric")[0]])
    if not field or force:
        return []
    fields = [each.name for predictor in loaded.predictors.values() for each in predictor.fields]
    named = re.compile(rf"\b{re.escape(field)}\b")
    if field in fields or any(named.search(file.read_text("utf-8", "replace")) for file in files):
        return []
    return [
        f"curate.balance is {field!r}, which is no output of the program ({', '.join(fields)}); "
        "name an output field, or go on with --force"
    ]


def _general(task: Task, _: bool) -> list[str]:
    if task.settings.student.train.replay:
        chats.read(prepare.replay_file(task))
    return []


def _too_large(run: Run) -> list[str]:
    """A base that this machine could not train even by single rows with nothing else running."""
    found = estimate.of(run)
    fixed = found.memory_bytes - found.memory["activations"]
    if run.force or fixed <= found.machine.memory:
        return []
    return [
        f"student.base is {found.base!r}: {found.method} holds about {fixed / 1e9:.0f} GB before the first row, "
        f"{found.machine.name} has {found.machine.memory / 1e9:.0f}; use a smaller base, lora or qlora, "
        "or go on with --force"
    ]
