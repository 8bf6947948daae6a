"""DSPy's own optimizers on this box: a provider that trains, exports, registers, loads and unloads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainingStatus

from trainer.errors import RuntimeUnavailable, TrainError
from trainer.provider.models import EmbeddedModels, KeepAlive, Models, OllamaModels
from trainer.provider.rows import conversations
from trainer.provider.tuning import Workshop, student_settings
from trainer.runs import Home
from trainer.runtimes.choice import OLLAMA_HOST, choice

PREFIX = "ollama_chat/"
"""What stands before a model's name in DSPy, on both runtimes: DSPy saves no `api_base`, and a name that begins so
asks this machine without one, and with no key. `openai/` would ask OpenAI with the user's."""
PREFIXES = (PREFIX, "ollama/", "openai/")
log = logging.getLogger("homestill.provider")


class TuningJob(TrainingJob):  # type: ignore[misc]
    """A fine-tuning under way. `result()` gives the tuned `dspy.LM`, or raises what stopped it.

    DSPy hands an error back as the job's result; here it is the job's exception. A training cannot be
    cancelled: close the provider or end the process, and the same call goes on where it was.
    """

    def __init__(self, *args: Any, provider: OllamaProvider, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._provider = provider
        self.set_running_or_notify_cancel()

    def set_result(self, result: Any) -> None:
        """DSPy calls it with the copy of its model under the new name, or with the error."""
        if isinstance(result, BaseException):
            self.set_exception(result)
            return
        result.finetuning_model = None  # from here on its own weights are tuned
        if (self.train_kwargs or {}).get("max_tokens") is not None:
            result.kwargs["max_tokens"] = None  # of the model that it is a copy of
        self._provider.reach(result)
        super().set_result(result)

    def cancel(self) -> bool:
        """False: it goes on."""
        return False

    def status(self) -> TrainingStatus:
        """Running, succeeded or failed."""
        if not self.done():
            return TrainingStatus.running
        return TrainingStatus.failed if self.exception() else TrainingStatus.succeeded


class OllamaProvider(dspy.Provider):  # type: ignore[misc]
    """Makes `dspy.LM(..., provider=OllamaProvider(base))` fine-tunable on this machine.

    `BootstrapFinetune`, `BetterTogether` and `Ensemble` run on it unchanged. A model that was fine-tuned
    before is fine-tuned further from its own weights. The same rows and settings find the same run again,
    in whatever order they come, and nothing is trained twice.

    Args:
        base: what is fine-tuned: a folder in the Hugging Face layout, or a hub name.
        name: of the models (`<name>:<hash>`) and of the folder of their runs.
        runtime: "embedded", or an Ollama host as in OLLAMA_HOST; by default what HOMESTILL_LOCAL says.
        student: settings of `student` and `student.train` in task.yaml, as one flat mapping.
            An LM's or an optimizer's `train_kwargs` win over them.
        home: where runs and models are kept; by default HOMESTILL_HOME.
        seed: of the training.
        keep_alive: how long Ollama holds a launched model: seconds, or a duration such as "30m".
        environment: by default the process's own.

    Raises:
        TrainError: with every setting that is unknown or out of range.
        RuntimeUnavailable: the runtime is one where models cannot be registered.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        name: str = "student",
        runtime: str | None = None,
        student: Mapping[str, Any] | None = None,
        home: str | Path | None = None,
        seed: int = 0,
        keep_alive: KeepAlive = "30m",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = partial(TuningJob, provider=self)
        environment = dict(os.environ if environment is None else environment)
        place = Home(Path(home).expanduser().resolve()) if home else Home.from_environment(environment)
        self._base = _located(str(base))
        given: dict[str, Any] = {"student": student, "seed": seed, "keep_alive": keep_alive}
        kept = place.root if home else None
        self._again = partial(type(self), self._base, name=name, runtime=runtime, home=kept, **given)
        self._settings = student_settings(self._base, student or {})
        self._student = dict(student or {})
        if runtime:  # what training asks of the runtime is asked of this one
            environment["HOMESTILL_LOCAL"] = "embedded" if runtime == "embedded" else "ollama"
        self._workshop = Workshop(name, place, environment, seed)
        self.models: Models = _models(runtime, environment, self._workshop)
        self._keep_alive = keep_alive

    def __deepcopy__(self, memo: dict[int, Any]) -> OllamaProvider:
        """DSPy copies programs with their models; the box behind them is one."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A saved program holds what the box was made of; the environment, where keys may lie, is the reader's own."""
        return self._again, ()

    def __enter__(self) -> OllamaProvider:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what this process started, a training among it, which goes on when it is asked for again; Ollama's models stay."""
        self._workshop.stop.set()
        self._workshop = replace(self._workshop, stop=threading.Event())
        self.models.close()

    def lm(self, model: str | None = None, **options: Any) -> dspy.LM:
        """A DSPy model on this box.

        Args:
            model: a name that was fine-tuned before; by default the base, exported and registered first.
            options: of `dspy.LM`.

        Raises:
            HomestillError: as export and register do.
        """
        if model is None:
            model = self._workshop.base(self._settings, self.models).name
        lm = dspy.LM(f"{PREFIX}{_bare(model)}", provider=self, **options)
        self.reach(lm)
        return lm

    def check(self, train_kwargs: Mapping[str, Any] | None = None) -> None:
        """Look whether a fine-tuning could begin, before a teacher is paid for its rows.

        Args:
            train_kwargs: as an LM or an optimizer will get them.

        Raises:
            HomestillError: settings are faulty, or models cannot be converted or registered.
        """
        student_settings(self._base, self._student, train_kwargs or {})
        self._workshop.check(self.models)

    def reach(self, lm: dspy.LM) -> None:
        """Tell a model where it answers; greedy and as long as it was made to, where it does not say otherwise."""
        kwargs = lm.kwargs
        kwargs["api_base"] = self.models.api_base
        if lm.model.startswith("openai/"):
            kwargs["api_key"] = "none"  # never the user's own, which DSPy would take
        if kwargs.get("temperature") is None:
            kwargs["temperature"] = 0.0  # Ollama's /v1 samples at 1.0 where it is missing
        if kwargs.get("max_tokens") is None:
            made = self._workshop.max_tokens(_bare(lm.model))
            kwargs["max_tokens"] = self._settings.max_tokens if made is None else made

    def launch(self, lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Load the model now rather than with its first question.

        Args:
            launch_kwargs: `keep_alive` for this model.

        Raises:
            RuntimeUnavailable: it is not there, or does not start.
        """
        options = launch_kwargs or lm.launch_kwargs
        self.models.load(_bare(lm.model), options.get("keep_alive", self._keep_alive))
        self.reach(lm)

    def kill(self, lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """Unload the model, which frees its memory; its next question loads it again.

        Raises:
            RuntimeUnavailable: Ollama cannot be reached.
        """
        self.models.unload(_bare(lm.model))

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: Any,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Train, export, register; one at a time. Called by `dspy.LM.finetune`.

        Args:
            model: the LM's name, or its `finetuning_model`: a folder or hub name, which wins over `base`.
            train_data: DSPy's chat rows.
            train_kwargs: settings of `student` and `student.train` in task.yaml.

        Returns:
            The tuned model's name for `dspy.LM`.

        Raises:
            HomestillError: the rows or settings are faulty, or a stage failed.
        """
        workshop = self._workshop  # the one of now: closed meanwhile, it makes nothing more
        rows = conversations(train_data, train_data_format)
        student = student_settings(self.weights(model), self._student, train_kwargs or {})
        made = workshop.tune(rows, student, self.models)
        return f"{PREFIX}{made.name}"

    def weights(self, model: str) -> str:
        """What is fine-tuned where DSPy names a model: its own weights where it was tuned here, else the base.

        A name without the prefix of a served model is an LM's `finetuning_model` and wins over the base.

        Raises:
            TrainError: the name is one of a model that was tuned here, and its weights are not there.
        """
        bare = _bare(model)
        if tuned := self._workshop.weights(bare):
            return str(tuned)
        if bare != model and self._workshop.names(bare):
            raise TrainError(
                f"{bare} has no weights in {self._workshop.home.root}, where it would be tuned further from; "
                "give the home where it was tuned, or tune the base again (OllamaProvider.lm())"
            )
        return self._base if bare != model else _located(model)


def _located(base: str) -> str:
    """A folder's absolute path; a hub's name as it is."""
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base


def _bare(model: str) -> str:
    prefix = next((one for one in PREFIXES if model.startswith(one)), "")
    return model.removeprefix(prefix)


def _models(runtime: str | None, environment: Mapping[str, str], workshop: Workshop) -> Models:
    if runtime is None:
        runtime = choice(environment)
        if runtime.startswith(("http://", "https://")):
            raise RuntimeUnavailable(
                f"HOMESTILL_LOCAL is {runtime!r}, where models cannot be registered; "
                'give runtime="embedded" or an Ollama host'
            )
    if runtime == "embedded":
        return EmbeddedModels(workshop.find)
    return OllamaModels(environment.get("OLLAMA_HOST") or OLLAMA_HOST if runtime == "ollama" else runtime)
