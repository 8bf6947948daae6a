"""What later stages need, looked at before the first call is paid for."""

from __future__ import annotations

from trainer.errors import ExportError, HomestillError, PreflightError
from trainer.export import converter
from trainer.runs import Run
from trainer.runtimes.choice import describe
from trainer.splits import MIN_SEALED, assigned
from trainer.template import Template
from trainer.training import base


def check(run: Run) -> None:
    """Find the base (downloaded if need be) and its template, the converter and the local runtime.

    Raises:
        PreflightError: with everything that is missing; nothing has been spent.
    """
    faults: list[str] = []
    try:
        _freeze(run)
    except HomestillError as error:
        faults += str(error).splitlines()
    except (OSError, ValueError) as error:  # transformers on a folder without a usable tokenizer
        faults.append(
            f"student.base is {run.task.settings.student.base!r}: its tokenizer cannot be loaded ({error})"
        )
    if not run.force:
        faults += _too_small(run)
    try:
        converter(run.environment)
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


def _freeze(run: Run) -> None:
    """The template decides whether a base can be served as it is trained; the tokenizer alone tells."""
    from transformers import AutoTokenizer

    Template.freeze(AutoTokenizer.from_pretrained(base.resolve(run), local_files_only=True))
