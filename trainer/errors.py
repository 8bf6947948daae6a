"""Every error that the trainer raises on purpose.

HomestillError                exit code 1; the message is value, rule, remedy
├── TaskError                 task.yaml, program or metric; collects all faults at once
├── DataError                 the task's data files; collects all bad rows at once
├── PreflightError            something that a later stage needs is missing; nothing was spent
├── TeacherError              the teacher cannot be reached or refuses
│   └── BudgetError           the next call would pass teacher.budget_usd
├── CurateError               too little, or nothing learnable, is left to train on
├── TrainError                the base cannot be loaded or the training failed
│   └── TemplateError         the base's chat template cannot be frozen
├── ExportError               converter or quantiser failed, or the GGUF lacks something
├── RuntimeUnavailable        Ollama or the embedded runtime cannot be reached or started
│   └── RegisterError         the model was refused, or does not answer as it was trained
├── EvaluateError             the stored answers do not cover the examples
├── ReleaseError              manifest, gate, current
├── DiskError                 not enough free space, asked before it is needed or found when it is
├── BusyError                 another run of the same task is under way
├── StoppedError              the run was told to end, and can be taken up again
├── BundleError               a bundle, backup or export is not what was signed, or cannot be written
└── StoreError                the database cannot be opened or is newer than this version
"""

from collections.abc import Sequence


class HomestillError(Exception):
    """Base of all. `str(error)` is what the user reads: one fault a line."""

    exit_code = 1


def told(error: OSError) -> str:
    """What the system refused, in a line; an OSError that a library raised may have no more than a text."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


class FaultsError(HomestillError):
    """An error that lists every fault found, each a full line of value, rule and remedy."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class TaskError(FaultsError):
    """Faults in task.yaml, or in the program or metric that it names."""


class DataError(FaultsError):
    """Faults in the data files, each with its file and line."""


class PreflightError(FaultsError):
    """What later stages need is missing; found before anything was paid for."""


class TeacherError(HomestillError):
    """The teacher cannot be reached, or refuses the call."""


class BudgetError(TeacherError):
    """The next paid call could pass the task's budget; it was not made."""


class CurateError(HomestillError):
    """What is left after curation cannot carry a training."""


class TrainError(HomestillError):
    """The base model cannot be loaded, or the training failed."""


class TemplateError(TrainError):
    """The base's chat template cannot be frozen, or a conversation cannot be rendered with it."""


class ExportError(HomestillError):
    """The GGUF could not be written, or lacks something that serving needs."""


class RuntimeUnavailable(HomestillError):
    """The local runtime (Ollama or embedded) cannot be reached or started."""


class RegisterError(RuntimeUnavailable):
    """The runtime refused the model, or the model does not answer as it was trained."""


class EvaluateError(HomestillError):
    """The stored answers do not cover the examples that are to be compared."""


class ReleaseError(HomestillError):
    """A release is missing, incomplete, or may not be promoted."""


class DiskError(HomestillError):
    """A stage needs more free space than the disk has."""


class BusyError(HomestillError):
    """Another process is running this task."""


class StoppedError(HomestillError):
    """The run was told to end; what it did is kept."""


class StoreError(HomestillError):
    """The database cannot be opened, or was written by a newer version."""


class BundleError(FaultsError):
    """A bundle, backup or export cannot be written, or is not byte for byte what was signed or noted."""
