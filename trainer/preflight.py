"""What later stages need, looked at before the first call is paid for."""

from __future__ import annotations

from trainer.errors import ExportError, HomestillError, PreflightError
from trainer.export import converter
from trainer.runs import Run
from trainer.runtimes.choice import describe
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
    try:
        converter(run.environment)
    except ExportError as error:
        faults.append(str(error))
    _, state, text = describe(run.environment)
    if state == "missing":
        faults.append(text)
    if faults:
        raise PreflightError([*faults, "nothing was asked of the teacher yet"])


def _freeze(run: Run) -> None:
    """The template decides whether a base can be served as it is trained; the tokenizer alone tells."""
    from transformers import AutoTokenizer

    Template.freeze(AutoTokenizer.from_pretrained(base.resolve(run), local_files_only=True))
