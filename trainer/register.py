"""Register: student and base become servable, and the student is proven to be served as it was trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.runtime.embedded import Endpoint
from trainer import process
from trainer import program as programs
from trainer.data import Example
from trainer.errors import RegisterError
from trainer.lm import session
from trainer.runs import Run, read_json, read_jsonl, sha256_file, sha256_json, write_json
from trainer.runtimes.choice import choice, launch, runtime
from trainer.runtimes.local import RECORD, Adapter, Chat, LocalModel, Registration, Runtime, record
from trainer.runtimes.parity import (
    Answered,
    Parity,
    Prompt,
    Tokens,
    Vocabulary,
    ask_all,
    compare_answers,
    equal_share,
    rendered_as_trained,
)
from trainer.teacher.client import open_ledger, teacher_lm
from trainer.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raise it when what was registered before no longer counts."""
REPLAYED = 64
"""Held-out prompts whose answers are compared."""
TOKENIZED = 256
"""Training conversations whose tokens are compared; it takes milliseconds each."""
BATCH = 8
REPLAY_TIMEOUT_S = 4 * 3600.0

logger = logging.getLogger("homestill.register")


def inputs(run: Run) -> dict[str, Any]:
    """What the outcome depends on."""
    exported = read_json(run.stage("export") / "summary.json")
    student = run.task.settings.student
    chosen = choice(run.environment)
    return {
        "version": VERSION,
        "model": exported["model"]["sha256"],
        "base": exported["base"]["sha256"],
        "template": sha256_json(exported["template"]),
        "train": sha256_file(run.stage("curate") / "train.jsonl"),
        "calibrate": sha256_file(run.stage("curate") / "calibrate.jsonl"),
        "program": read_json(run.stage("capture") / "summary.json")["program"],
        "runtime": [chosen, run.environment.get("OLLAMA_HOST") if chosen == "ollama" else None],
        "context": student.context,
        "max_tokens": student.max_tokens,
        "llama_cpp": version("llama-cpp-python"),
    }


def run(run: Run, *, local: Runtime | None = None, chat: Chat | None = None) -> None:
    """Register student and base, prove parity, write registration.json and parity.json.

    Args:
        local: where the models run; by default the runtime that the run is set to.
        chat: asks their servers.

    Raises:
        RegisterError: a model was refused, or is not served as it was trained; what this call made is removed.
        RuntimeUnavailable: the runtime cannot be reached or started.
    """
    local = local or runtime(run)
    folder = run.stage("register")
    (run.folder / RECORD).unlink(missing_ok=True)
    student, base = local_models(run)
    parity = Parity()
    with taken_back(local, [student.name, base.name], folder):
        try:
            registered, registered_base = local.register(student), local.register(base)
            _prove(run, parity, local, chat or Chat(), registered=registered, model=student)
        except RegisterError as error:
            parity.fault = str(error)
            write_json(folder / "parity.json", parity.to_json())
            raise
    write_json(folder / "parity.json", parity.to_json())
    record(run.folder, {"model": registered, "base": registered_base})
    logger.info("registered %s, %.3f of its answers as trained", registered.name, parity.answers_equal)


@contextmanager
def taken_back(local: Runtime, names: Sequence[str], folder: Path) -> Iterator[None]:
    """Remove the models that a registration makes where it is refused; an earlier try that was killed is the same one.

    Names are hashes of the content: what was there before belongs to other runs, or to the release.

    Args:
        names: that may be made.
        folder: of the stage, which remembers what is made meanwhile.
    """
    noted = folder / "made.json"
    before = read_json(noted) if noted.is_file() else []
    made = [name for name in names if name in before or not local.has(name)]
    write_json(noted, made)
    try:
        yield
    except RegisterError:
        for name in made:
            local.remove(name)
        noted.unlink()
        raise
    noted.unlink()


def local_models(run: Run) -> tuple[LocalModel, LocalModel]:
    folder, settings = run.stage("export"), run.task.settings
    exported = read_json(folder / "summary.json")
    own_template = Template.from_json(exported["template"])
    # an export from before there were soft prompts has one template for both
    base_template = Template.from_json(exported.get("base_template", exported["template"]))

    def model(role: str, key: str, adapter: Adapter | None = None) -> LocalModel:
        return LocalModel.of(
            settings.name,
            role,
            gguf=folder / f"{key}.gguf",
            sha256=exported[key]["sha256"],
            template=base_template if role else own_template,
            context=settings.student.context,
            max_tokens=settings.student.max_tokens,
            adapter=adapter,
        )

    if settings.student.deliver == "adapter":
        own = Adapter(folder / "adapter.gguf", exported["model"]["sha256"])
        return model("", "base", own), model("base", "base")
    return model("", "model"), model("base", "base")


@dataclass(frozen=True)
class _Replay:
    """The held-out prompts, put to one system after the other."""

    run: Run
    tokens: Tokens
    prompts: list[Prompt]
    chat: Chat
    max_tokens: int

    def served(self, endpoint: Endpoint) -> Answered:
        return ask_all(self.chat, endpoint, self.prompts, self.max_tokens)

    def embedded(self, registration: Registration) -> Answered:
        """The GGUF without the server that was registered."""
        with launch(registration) as endpoint:
            return self.served(endpoint)

    def trained(self) -> Answered:
        """The 16-bit weights, asked once and kept for a rerun."""
        folder = self.run.stage("register")
        answers = folder / "sixteen_bit.json"
        if not answers.is_file():
            write_json(folder / "sixteen_bit_request.json", self._request())
            command = process.module(
                "trainer.runtimes.sixteen_bit", folder / "sixteen_bit_request.json", answers
            )
            environment = {**self.run.environment, **process.QUIET, **process.OFFLINE}
            done = process.run(command, timeout=REPLAY_TIMEOUT_S, environment=environment)
            if done.code:
                raise RegisterError(
                    f"the 16-bit weights gave no answers ({done.last_line}); train the model again"
                )
        return Answered([self.tokens.decode(ids) for ids in read_json(answers)])

    def _request(self) -> dict[str, Any]:
        tokenizer = self.tokens.tokenizer
        ends = [tokenizer.convert_tokens_to_ids(text) for text in self.tokens.template.stop]
        return {
            "model": str(_weights(self.run)),
            "prompts": [self.tokens.ids(prompt.messages) for prompt in self.prompts],
            "max_tokens": self.max_tokens,
            "ends": ends,
            "pad": ends[0],
            "batch": BATCH,
        }


def _prove(
    run: Run, parity: Parity, local: Runtime, chat: Chat, *, model: LocalModel, registered: Registration
) -> None:
    with closing(Vocabulary(model.gguf)) as vocabulary:
        tokens = Tokens(_tokenizer(run), model.template, vocabulary, model.context)
        prompts = _prompts(run)
        trained_rows = read_jsonl(run.stage("curate") / "train.jsonl")[:TOKENIZED]
        compared = tokens.training(trained_rows)
        parity.evidence["tokens"] = {"conversations": len(trained_rows), "tokens": compared}
        replay = _Replay(run, tokens, prompts, chat, model.max_tokens)
        with local.serving(registered) as endpoint:
            rendered_as_trained(tokens, local, endpoint, prompts)
            parity.prompt_tokens_equal = True
            parity.evidence["tokens"]["rendered_prompts"] = len(prompts)
            served = replay.served(endpoint)
        trained = replay.trained()
        if registered.runtime != "embedded":
            parity.evidence["gguf_answers_equal"] = equal_share(trained, replay.embedded(registered))
    compare_answers(parity, prompts, trained, served, _judge(run))


def _prompts(run: Run) -> list[Prompt]:
    """The teacher's prompts for held-out examples, the same ones every time: ids are hashes, so their order is random.

    Raises:
        RegisterError: none was captured.
    """
    wanted = {row["id"] for row in read_jsonl(run.stage("curate") / "calibrate.jsonl")}
    answers = run.store.answers(read_json(run.stage("capture") / "summary.json")["system"])
    found = {
        (example, call["predictor"]): Prompt(example, call["predictor"], call["messages"])
        for example in wanted & set(answers)
        for call in answers[example].calls
        if run.task.settings.student.predictor in (None, call["predictor"])
    }
    if not found:
        raise RegisterError("no captured prompt belongs to the calibrate split; run capture and curate again")
    return [found[key] for key in sorted(found)][:REPLAYED]


def _judge(run: Run) -> Callable[[Prompt, str], float] | None:
    """Scores one answer; None for a program of several predictors, where one answer decides nothing."""
    captured = read_json(run.stage("capture") / "summary.json")
    asked = teacher_lm(
        run, captured["program"], "judge", open_ledger(run)
    )  # bought only if the metric asks a model
    program = programs.load(run.task, run.stage("capture") / "program.json", asked)
    if len(program.predictors) != 1:
        return None
    values = {row["id"]: row["values"] for row in read_jsonl(run.stage("curate") / "calibrate.jsonl")}

    def judge(prompt: Prompt, text: str) -> float:
        with session(prompt.example, program.names):
            return program.judge_completion(Example(prompt.example, values[prompt.example]), text)

    return judge


def _weights(run: Run) -> Path:
    return run.stage("train") / "model"


def _tokenizer(run: Run) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_weights(run), local_files_only=True)
    return tokenizer
