"""What later stages need, looked at before the first call is paid for."""

from __future__ import annotations

from trainer import child, estimate, prepare
from trainer.conversion import adapter as adapters
from trainer.errors import ExportError, HomestillError, PreflightError
from trainer.export import SCRIPT, converter
from trainer.runs import Run
from trainer.runtimes.choice import describe
from trainer.splits import MIN_SEALED, assigned


def check(run: Run) -> None:
    """Find the base (downloaded if need be), what its method needs, the converter and the local runtime.

    Raises:
        PreflightError: with everything that is missing; nothing has been spent.
    """
    faults: list[str] = []
    try:
        prepare.choose(run, child.environment(run.environment))
        faults += _too_large(run)
    except HomestillError as error:
        faults += str(error).splitlines()
    except (OSError, ValueError) as error:  # transformers on a folder without a usable tokenizer
        faults.append(
            f"student.base is {run.task.settings.student.base!r}: its tokenizer cannot be loaded ({error})"
        )
    if not run.force:
        faults += _too_small(run)
    try:
        apart = run.task.settings.student.deliver == "adapter"
        converter(run.environment, SCRIPT, *([adapters.SCRIPT] if apart else []))
    except ExportError as error:
        faults.append(str(error))
    _, state, text = describe(run.environment)
    if state == "missing":
        faults.append(text)
    if faults:
        raise PreflightError([*faults, "nothing was asked of the teacher yet"])


def _too_small(run: Run) -> list[str]:
    """Splits that curate would refuse however good the answers were."""
    sizes = {split: len(rows) for split, rows in assigned(run.task).splits.items()}
    needed = {"train": run.task.settings.curate.min_examples, "calibrate": MIN_SEALED, "test": MIN_SEALED}
    return [
        f"the {split} split holds {sizes[split]} examples, {least} are needed; add data, or go on with --force"
        for split, least in needed.items()
        if sizes[split] < least
    ]


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
