"""The task's own DSPy program and metric: loaded, run on one example, judged."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError, LMNotConfiguredError
from pydantic_core import to_jsonable_python

from serve.confidence import Field
from trainer.data import Example
from trainer.errors import HomestillError, RuntimeUnavailable, TaskError, TeacherError
from trainer.lm import Session, session
from trainer.runs import read_json, sha256_json
from trainer.task import Task
from trainer.traces import Answer

ADAPTER = "chat"

Metric = Callable[..., Any]


@dataclass(frozen=True)
class Predictor:
    """A predictor of the program as the router knows it."""

    name: str
    fields: list[Field]
    """Output fields; `labels` holds the allowed values of a Literal."""


@dataclass(frozen=True)
class Program:
    """A loaded program with its metric."""

    task: Task
    module: dspy.Module
    metric: Metric
    judge: dspy.LM | None = None
    """The model that a metric may ask (SemanticF1 and the like)."""

    @property
    def predictors(self) -> dict[str, Predictor]:
        return {name: Predictor(name, _fields(predict)) for name, predict in self.module.named_predictors()}

    @property
    def distilled(self) -> str | None:
        """The predictor whose answers decide what may be routed; None where there are several."""
        only = next(iter(self.predictors)) if len(self.predictors) == 1 else None
        return self.task.settings.student.predictor or only

    @property
    def names(self) -> dict[int, str]:
        """Predictor names by the `id` of the predictor."""
        return {id(predict): name for name, predict in self.module.named_predictors()}

    @property
    def state(self) -> dict[str, Any]:
        """The program's state as DSPy writes it to JSON."""
        state: dict[str, Any] = self.module.dump_state()
        return state

    @property
    def hash(self) -> str:
        """Hash of source, state and adapter: what decides the prompts."""
        return sha256_json([self.task.code_sha256, self.state, ADAPTER])

    def score(self, example: Example, prediction: Any, *, strict: bool = False) -> float:
        """The metric's verdict, 0..1.

        Args:
            strict: judge as DSPy does while it collects traces (`trace` is given to the metric).

        Raises:
            TaskError: the metric failed, or gave something that is no number from 0 to 1.
        """
        gold = dspy.Example(**example.values).with_inputs(*self.task.settings.inputs)
        with dspy.context(lm=self.judge):
            try:
                given = self.metric(gold, prediction, [] if strict else None)
                value = float(given.score if isinstance(given, dspy.Prediction) else given)
            except LMError as error:
                raise translated(error, TeacherError) from error
            except Exception as error:
                raise TaskError(
                    [f"metric failed on example {example.id}: {_brief(error)}; mend the metric"]
                ) from error
        if not 0 <= value <= 1:
            raise TaskError(
                [f"metric gave {value!r} for example {example.id}; return a bool or a number from 0 to 1"]
            )
        return value

    @contextmanager
    def asking(self, predictor: str, lm: dspy.LM) -> Iterator[None]:
        """Let one predictor ask a model of its own, whatever the others ask."""
        predict = dict(self.module.named_predictors())[predictor]
        before, predict.lm = predict.lm, lm
        try:
            yield
        finally:
            predict.lm = before

    def parse(self, predictor: str, completion: str) -> dict[str, Any]:
        """Output fields of a completion, as the program's adapter reads them.

        Raises:
            AdapterParseError: the completion does not have the adapter's form.
        """
        signature = dict(self.module.named_predictors())[predictor].signature
        fields: dict[str, Any] = adapter().parse(signature, completion)
        return fields

    def judge_completion(self, example: Example, completion: str) -> float:
        """Score of a program with a single predictor, had it received this completion; 0 if unparsable."""
        (name,) = self.predictors
        try:
            return self.score(example, dspy.Prediction(**self.parse(name, completion)))
        except AdapterParseError:
            return 0.0


def adapter() -> dspy.ChatAdapter:
    """The one adapter: a parse failure is a failure, never a second, silent call in another format."""
    return dspy.ChatAdapter(use_json_adapter_fallback=False)


def load(task: Task, state: Path | None = None, judge: dspy.LM | None = None) -> Program:
    """Load the program and the metric from the task's own files.

    Args:
        state: JSON state to load into the program, as `capture` writes it.
        judge: the model that the metric may ask.

    Raises:
        TaskError: a file does not import, or does not hold what task.yaml names.
    """
    program_class = _attribute(task, "program")
    metric = _attribute(task, "metric")
    if not (isinstance(program_class, type) and issubclass(program_class, dspy.Module)):
        raise TaskError(
            [f"program is {task.settings.program}; it must name a class derived from dspy.Module"]
        )
    if not callable(metric):
        raise TaskError([f"metric is {task.settings.metric}; it must name a function"])
    try:
        module = program_class()
        if state:
            module.load_state(read_json(state))
    except Exception as error:
        raise TaskError([f"program {task.settings.program} cannot be made: {_brief(error)}"]) from error
    if not list(module.named_predictors()):
        raise TaskError([f"program {task.settings.program} holds no predictor; use dspy.Predict in it"])
    if faults := _predictor_faults(task, dict(module.named_predictors())):
        raise TaskError(faults)
    return Program(task, module, metric, judge)


def _predictor_faults(task: Task, predictors: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{name} of {task.settings.program} asks a model of its own, whose calls would be neither stored nor counted "
        "against the budget; take its lm away"
        for name, predict in predictors.items()
        if predict.lm is not None
    ]
    wanted, names = task.settings.student.predictor, list(predictors)
    if wanted and wanted not in names:
        faults.append(f"student.predictor is {wanted!r}; {task.settings.program} has {', '.join(names)}")
    elif wanted and names == [wanted]:
        faults.append(
            f"student.predictor is {wanted!r}, the only predictor of {task.settings.program}; leave it out"
        )
    return faults


def answer(program: Program, example: Example, lm: dspy.LM, role: str, system: str) -> Answer:
    """Put one example to one system and judge the outcome.

    A completion that cannot be parsed, or that does not fit the context, is an answer with score 0;
    a model that cannot be reached is an error.

    Args:
        role: teacher, base or student.
        system: identity of what answers.

    Raises:
        TeacherError, RuntimeUnavailable: the model could not be reached or refused.
        TaskError: the metric failed.
    """
    return judged(program, example, lm, role, system)[0]


def replays(program: Program, example: Example, lm: dspy.LM) -> bool:
    """Whether the program asks nothing that is not stored.

    Args:
        lm: a teacher's that may buy nothing.
    """
    inputs = {name: example.values[name] for name in program.task.settings.inputs}
    with (
        session(example.id, program.names) as opened,
        dspy.context(lm=lm, adapter=adapter()),
        suppress(Exception),  # whatever the program makes of an answer, or of a refusal
    ):
        program.module(**inputs)
    return not opened.refused


def judged(program: Program, example: Example, lm: dspy.LM, role: str, system: str) -> tuple[Answer, Session]:
    """Like `answer`, with the session of the calls."""
    failure = TeacherError if role == "teacher" else RuntimeUnavailable
    inputs = {name: example.values[name] for name in program.task.settings.inputs}
    started = time.perf_counter()
    prediction, fault = None, None
    with session(example.id, program.names) as opened, dspy.context(lm=lm, adapter=adapter()):
        try:
            prediction = program.module(**inputs)
        except (AdapterParseError, ContextWindowExceededError) as error:
            fault = _brief(error)
        except LMError as error:
            raise translated(error, TeacherError if opened.refused else failure) from error
        except Exception as error:  # noqa: BLE001  the program's own code failed on this answer: it counts as wrong
            fault = _brief(error)
    for refused in opened.refused.values():
        raise translated(refused, TeacherError) from refused
    elapsed = (time.perf_counter() - started) * 1000
    calls = list(opened.calls)
    score, strict = 0.0, 0.0
    if prediction is not None:
        with session(example.id, {}):
            score = program.score(example, prediction)
        with session(example.id, {}):  # a new session: what the judge is asked again is replayed, not bought
            strict = program.score(example, prediction, strict=True)
    record = Answer(
        system=system,
        example=example.id,
        role=role,
        task=program.task.name,
        outputs=_outputs(prediction),
        score=score,
        # what the teacher answered before is replayed in no time; how long it took then is what counts
        latency_ms=round(sum(call["latency_ms"] for call in calls) if opened.traces else elapsed, 3),
        prompt_tokens=sum(call["prompt_tokens"] for call in calls),
        completion_tokens=sum(call["completion_tokens"] for call in calls),
        cost_usd=sum(call["cost_usd"] for call in calls),
        error=fault,
        calls=calls,
        strict_score=strict,
    )
    return record, opened


def _outputs(prediction: dspy.Prediction | None) -> dict[str, Any]:
    """The program's outputs as JSON holds them; DSPy puts the log-probabilities beside them, which are none."""
    values = {} if prediction is None else {**prediction}
    values.pop("logprobs", None)
    found: dict[str, Any] = to_jsonable_python(values, fallback=str)
    return found


def _attribute(task: Task, key: Literal["program", "metric"]) -> Any:
    file, name = task.source(key)
    module = _imported(file, task)
    if not hasattr(module, name):
        raise TaskError([f"{key} is {getattr(task.settings, key)}; {file.name} holds no {name}"])
    return getattr(module, name)


def _imported(file: Path, task: Task) -> ModuleType:
    """Import a task's file under a name of its own.

    Its folder can be imported from: meanwhile before everything else, and later, when a function imports, after it.
    """
    name = f"homestill_task_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TaskError([f"{file} cannot be imported; name a .py file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(task.folder)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TaskError([f"{file.name} cannot be imported: {_brief(error)}; mend it"]) from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    return module


def _fields(predict: Any) -> list[Field]:
    fields: Mapping[str, Any] = predict.signature.output_fields
    return [Field(name, _labels(info.annotation)) for name, info in fields.items()]


def _labels(annotation: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in get_args(annotation)) if get_origin(annotation) is Literal else ()


def translated(error: Exception, failure: type[HomestillError]) -> HomestillError:
    """Ours for theirs; an error of ours that passed through DSPy comes out as itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HomestillError):
            return cause
        cause = cause.__cause__
    if isinstance(error, LMNotConfiguredError):
        variable = next(iter(getattr(error, "env_keys", ())), "the provider's key variable")
        return failure(
            f"no key for {error.model}: {variable} is not set; export it, or name a file in {variable}_FILE"
        )
    return failure(f"{_brief(error)}; {_remedy(error)}")


def _remedy(error: LMError) -> str:
    remedies = {
        "LMAuthError": "check the key",
        "LMBillingError": "check the account's balance",
        "LMRateLimitError": "lower teacher.concurrency or wait, then run again",
        "LMUnsupportedModelError": "check the model's name",
        "LMTransportError": "check the address and that the server is up, then run again",
        "LMTimeoutError": "raise teacher.timeout_s or try later",
    }
    return remedies.get(type(error).__name__, "run again; what was answered so far is kept")


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
