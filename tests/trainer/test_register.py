"""The register stage: both models servable and the student proven, or neither and the reason written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from serve.runtime.embedded import Endpoint
from tests.contract import files
from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Llama
from tests.tasks import row, write_task
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.conversion.test_adapter import made as adapted_model
from trainer import register, task
from trainer.data import example_id
from trainer.errors import RegisterError, RuntimeUnavailable
from trainer.runs import Home, Run, read_json, sha256_file, write_json, write_jsonl
from trainer.runtimes.choice import EmbeddedRuntime, ServerRuntime, choice, describe, runtime
from trainer.runtimes.local import RECORD, Chat, Kind, LocalModel, Messages, Registration, Rendered, recorded
from trainer.runtimes.ollama import Ollama
from trainer.template import Template
from trainer.traces import Answer, Store

RIGHT = "[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
SYSTEM = "Your input fields are: `text` (str). Your output fields are: `label` (str)."


def messages(number: int) -> list[dict[str, str]]:
    text = row(number)["text"]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"[[ ## text ## ]]\n{text}"}]


def answer(number: int) -> str:
    return RIGHT.format(label=row(number)["label"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and GGUF of one tiny model, its tokenizer beside."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.save_pretrained(folder / "model")
    model.to(torch.float32).save_pretrained(folder / "model")
    template = Template.freeze(tokenizer)
    files.llama(folder / "model.gguf", model, tokenizer, template.jinja)
    write_json(folder / "template.json", template.to_json())
    return folder


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Iterator[Run]:
    """A run after export, with 10 calibrate examples that the teacher answered."""
    loaded = task.load(write_task(tmp_path / "task", student={"context": 512, "max_tokens": 12}))
    home = Home(tmp_path / "home")
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    here = Run(loaded, home, store, home.runs("words") / "r1")
    (here.stage("train") / "model").symlink_to(made / "model")
    for name in ("model", "base"):
        (here.stage("export") / f"{name}.gguf").symlink_to(made / "model.gguf")
    digest = {"sha256": sha256_file(made / "model.gguf"), "quantization": "f16"}
    exported = {"model": digest, "base": digest, "template": read_json(made / "template.json")}
    write_json(here.stage("export") / "summary.json", exported)
    write_json(here.stage("capture") / "summary.json", {"program": "p", "teacher": "t", "system": "teacher"})
    (here.stage("capture") / "program.json").write_text(json.dumps(programs_state(loaded)))
    trained = [
        {"messages": messages(n), "completion": answer(n), "example": str(n), "predictor": "sort"}
        for n in range(4)
    ]
    write_jsonl(here.stage("curate") / "train.jsonl", trained)
    held_out = [{"id": identity(n), "values": row(n)} for n in range(10, 20)]
    write_jsonl(here.stage("curate") / "calibrate.jsonl", held_out)
    for number in range(10, 20):
        store.add_answer(taught(number))
    yield here
    store.close()


def programs_state(loaded: task.Task) -> dict[str, Any]:
    from trainer import program

    return program.load(loaded).state


def identity(number: int) -> str:
    return example_id(row(number), ["text"])


def taught(number: int) -> Answer:
    call = {"predictor": "sort", "messages": messages(number), "completion": answer(number)}
    return Answer("teacher", identity(number), "teacher", "words", {}, 1.0, 1.0, 1, 1, 0.0, None, [call])


@dataclass
class Fake:
    """A runtime whose answers and renderings are given."""

    template: Template
    answers: dict[str, str] = field(default_factory=dict)
    kind: Kind = "embedded"
    spoil: str = ""
    """Is put before every rendered prompt."""
    known: set[str] = field(default_factory=set)
    """Names that were there before."""
    refused: str = ""
    """The name that is not taken."""
    registered: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def register(self, model: LocalModel) -> Registration:
        if model.name == self.refused:
            raise RegisterError("no such thing")
        self.registered.append(model.name)
        return Registration(self.kind, model.name, model.sha256, model.context, gguf=str(model.gguf))

    @contextmanager
    def serving(self, registration: Registration) -> Iterator[Endpoint]:
        yield Endpoint("http://fake/v1", registration.name)

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        text = self.template.render(messages, add_generation_prompt=True).removeprefix(self.template.bos)
        return Rendered(text=self.spoil + text)

    def has(self, name: str) -> bool:
        return name in self.known

    def remove(self, name: str) -> None:
        self.removed.append(name)

    @property
    def chat(self) -> Chat:
        def served(request: httpx.Request) -> httpx.Response:
            asked = json.loads(request.content)["messages"][-1]["content"]
            choice = {"message": {"content": self.answers[asked]}, "finish_reason": "stop"}
            return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 1}})

        return Chat(httpx.MockTransport(served))


@pytest.fixture
def fake(run: Run) -> Fake:
    """Serves what the 16-bit weights are said to have answered."""
    template = Template.from_json(read_json(run.stage("export") / "summary.json")["template"])
    tokenizer = tiny_tokenizer()
    numbers = sorted(range(10, 20), key=identity)
    texts = [answer(number) for number in numbers]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    write_json(run.stage("register") / "sixteen_bit.json", ids)
    return Fake(template, {messages(n)[-1]["content"]: answer(n) for n in numbers})


def parity(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run.stage("register") / "parity.json")
    return found


def test_what_is_served_as_trained_is_registered(run: Run, fake: Fake) -> None:
    register.run(run, local=fake, chat=fake.chat)
    found = parity(run)
    assert (found["prompt_tokens_equal"], found["answers_equal"], found["metric_delta"]) == (True, 1.0, 0.0)
    assert found["fault"] is None
    assert found["evidence"]["answers"]["served_score"] == 1.0
    assert found["evidence"]["tokens"]["conversations"] == 4
    names = [recorded(run.folder)[key].name for key in ("model", "base")]
    assert names == fake.registered
    assert names[0].startswith("words:")
    assert names[1].startswith("words:base-")
    assert fake.removed == []


def test_a_linked_record_names_the_files_of_the_run_that_links(run: Run, fake: Fake) -> None:
    register.run(run, local=fake, chat=fake.chat)
    other = run.folder.with_name("other")
    shutil.copytree(run.folder, other)
    assert str(run.folder) not in (other / RECORD).read_text("utf-8")
    before = read_json(run.folder / RECORD)
    before["model"]["gguf"] = str(run.folder / "export" / "model.gguf")  # as earlier versions wrote it
    write_json(other / RECORD, before)
    shutil.rmtree(run.folder)
    for key, found in recorded(other).items():
        assert found.gguf == str(other / "export" / f"{key}.gguf") and Path(found.gguf).is_file()


def test_other_prompt_tokens_undo_the_registration(run: Run, fake: Fake) -> None:
    write_json(run.stage("register") / "registration.json", {"model": "of an earlier try"})
    fake.spoil = "Hello. "
    with pytest.raises(RegisterError, match="other tokens of a prompt than training"):
        register.run(run, local=fake, chat=fake.chat)
    assert not (run.stage("register") / "registration.json").exists()
    assert fake.removed == fake.registered
    assert parity(run)["prompt_tokens_equal"] is False
    assert "other tokens" in parity(run)["fault"]


def test_what_was_there_before_stays_where_parity_fails(run: Run, fake: Fake) -> None:
    student, base = register.local_models(run)
    fake.known, fake.spoil = {base.name}, "Hello. "
    with pytest.raises(RegisterError):
        register.run(run, local=fake, chat=fake.chat)
    assert fake.removed == [student.name]


def test_what_a_killed_try_made_is_taken_back_by_the_next(run: Run, fake: Fake) -> None:
    gone = Chat(httpx.MockTransport(lambda _: httpx.Response(503)), sleep=lambda _: None)
    with pytest.raises(RuntimeUnavailable):
        register.run(run, local=fake, chat=gone)
    fake.known, fake.spoil = set(fake.registered), "Hello. "
    with pytest.raises(RegisterError):
        register.run(run, local=fake, chat=fake.chat)
    assert set(fake.removed) == fake.known


def test_a_base_that_is_refused_takes_the_student_with_it(run: Run, fake: Fake) -> None:
    student, base = register.local_models(run)
    fake.refused = base.name
    with pytest.raises(RegisterError, match="no such thing"):
        register.run(run, local=fake, chat=fake.chat)
    assert student.name in fake.removed


def test_worse_answers_undo_the_registration(run: Run, fake: Fake) -> None:
    for number in (10, 11, 12):
        fake.answers[messages(number)[-1]["content"]] = "even"
    with pytest.raises(RegisterError, match=r"scores 0\.700 where the trained weights score 1\.000"):
        register.run(run, local=fake, chat=fake.chat)
    assert not (run.stage("register") / "registration.json").exists()
    assert fake.removed == fake.registered
    found = parity(run)
    assert (found["prompt_tokens_equal"], found["metric_delta"]) == (True, pytest.approx(-0.3))
    assert found["fault"]


def test_a_runtime_that_goes_away_is_no_verdict(run: Run, fake: Fake) -> None:
    gone = Chat(httpx.MockTransport(lambda _: httpx.Response(503)), sleep=lambda _: None)
    with pytest.raises(RuntimeUnavailable):
        register.run(run, local=fake, chat=gone)
    assert not (run.stage("register") / "registration.json").exists()
    assert not (run.stage("register") / "parity.json").exists()
    assert fake.removed == []


def test_held_out_prompts_are_needed(run: Run, fake: Fake) -> None:
    write_jsonl(run.stage("curate") / "calibrate.jsonl", [])
    with pytest.raises(RegisterError, match="no captured prompt"):
        register.run(run, local=fake, chat=fake.chat)


def test_inputs_change_with_what_decides_the_outcome(run: Run) -> None:
    before = register.inputs(run)
    assert register.inputs(run) == before
    write_jsonl(run.stage("curate") / "calibrate.jsonl", [])
    after = register.inputs(run)
    assert {key for key in before if before[key] != after[key]} == {"calibrate"}


def test_the_choice_of_a_runtime(run: Run) -> None:
    assert choice({}) == "embedded"
    assert choice({"OLLAMA_HOST": "ollama"}) == "ollama"
    assert choice({"OLLAMA_HOST": "ollama", "HOMESTILL_LOCAL": "embedded"}) == "embedded"
    with pytest.raises(
        RuntimeUnavailable, match="HOMESTILL_LOCAL is 'vllm'; use ollama, embedded or the URL"
    ):
        choice({"HOMESTILL_LOCAL": "vllm"})
    for environment, kind in (
        ({}, EmbeddedRuntime),
        ({"HOMESTILL_LOCAL": "http://gpu:8000"}, ServerRuntime),
        ({"HOMESTILL_LOCAL": "ollama"}, Ollama),
    ):
        chosen = runtime(Run(run.task, run.home, run.store, run.folder, environment))
        assert isinstance(chosen, kind)


def test_runtimes_are_described(tmp_path: Path) -> None:
    assert describe({})[:2] == ("embedded", "ok")
    assert describe({"HOMESTILL_LOCAL": "http://127.0.0.1:1"})[1] == "missing"
    assert describe({"OLLAMA_HOST": "127.0.0.1:1"})[1] == "missing"
    with OllamaDouble(tmp_path) as double:
        assert describe({"OLLAMA_HOST": double.url}) == (
            "ollama",
            "ok",
            f"version 0.33.0-double at {double.url}",
        )
        assert describe({"HOMESTILL_LOCAL": double.url}) == ("url", "ok", f"{double.url} serves no model")


@pytest.fixture
def model(run: Run) -> LocalModel:
    folder = run.stage("export")
    exported = read_json(folder / "summary.json")
    template = Template.from_json(exported["template"])
    return LocalModel.of(
        "words",
        "",
        gguf=folder / "model.gguf",
        sha256=exported["model"]["sha256"],
        template=template,
        context=512,
        max_tokens=12,
    )


class TestServerRuntime:
    def server(self, *names: str) -> ServerRuntime:
        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/v1/models":
                return httpx.Response(200, json={"data": [{"id": name} for name in names]})
            logprobs = {"content": [{"token": "x", "logprob": -0.1}]}
            choice = {"message": {"content": "x"}, "finish_reason": "length", "logprobs": logprobs}
            return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 42}})

        return ServerRuntime("http://gpu:8000/v1/", transport=httpx.MockTransport(answer))

    def test_a_served_model_is_found(self, model: LocalModel) -> None:
        server = self.server("other", model.name)
        registration = server.register(model)
        assert registration == Registration.from_json(json.loads(json.dumps(registration.to_json())))
        with server.serving(registration) as endpoint:
            assert endpoint == Endpoint("http://gpu:8000/v1", model.name)
            assert server.render(endpoint, messages(1)) == Rendered(count=42)

    def test_one_that_is_not_served_is_asked_for(self, model: LocalModel) -> None:
        with pytest.raises(
            RegisterError, match=f"serves other; it must serve {model.name}: start it there from"
        ):
            self.server("other").register(model)

    def test_no_server(self, model: LocalModel) -> None:
        with pytest.raises(RuntimeUnavailable, match="does not list models"):
            ServerRuntime("http://127.0.0.1:1").register(model)


class TestEmbeddedRuntime:
    def test_a_file_that_is_gone(self, model: LocalModel) -> None:
        registration = Registration("embedded", "m", model.sha256, 512, gguf="/nowhere/model.gguf")
        with (
            pytest.raises(RuntimeUnavailable, match="does not exist"),
            EmbeddedRuntime().serving(registration),
        ):
            pass

    def test_a_server_that_answers_is_tried_and_shows_its_prompt(self, model: LocalModel) -> None:
        started: list[str] = []

        @contextmanager
        def launch(registration: Registration) -> Iterator[Endpoint]:
            started.append(registration.name)
            yield Endpoint("http://fake/v1", registration.name)

        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/extras/render":
                return httpx.Response(200, json={"prompt": "text", "tokens": [1, 2]})
            logprobs = {"content": [{"token": "x", "logprob": -0.1}]}
            choice = {"message": {"content": "x"}, "finish_reason": "stop", "logprobs": logprobs}
            return httpx.Response(200, json={"choices": [choice]})

        local = EmbeddedRuntime(launch, httpx.MockTransport(answer))
        registration = local.register(model)
        assert started == [model.name]
        with local.serving(registration) as endpoint:
            assert local.render(endpoint, messages(1)) == Rendered(text="text", tokens=[1, 2])


@pytest.mark.slow
def test_a_real_model_in_the_embedded_runtime(run: Run) -> None:
    register.run(run, local=EmbeddedRuntime())
    found = parity(run)
    assert found["prompt_tokens_equal"] is True
    assert found["answers_equal"] >= 0.8, "random weights, so near-ties may fall either way"
    assert found["metric_delta"] == 0.0
    assert found["evidence"]["answers"]["n"] == 10


@pytest.mark.slow
def test_a_real_model_in_a_double_of_ollama(run: Run, tmp_path: Path) -> None:
    engine = Llama()
    try:
        with OllamaDouble(tmp_path / "blobs", engine) as double:
            register.run(run, local=Ollama(double.url))
            found = parity(run)
            assert found["prompt_tokens_equal"] is True
            assert found["answers_equal"] >= 0.8
            assert found["evidence"]["gguf_answers_equal"] >= 0.8
            assert len(double.models.all()) == 2
            double.faults.set({"misdetected_template": 1})
            for name in [model.name for model in double.models.all()]:
                double.models.delete(name)
            with pytest.raises(RegisterError, match="did not take the template"):
                register.run(run, local=Ollama(double.url))
            assert double.models.all() == []
            assert not (run.stage("register") / "registration.json").exists()
    finally:
        engine.close()


@pytest.mark.slow
def test_an_adapter_beside_its_base_is_served_as_the_merged_weights(run: Run, tmp_path: Path) -> None:
    """Embedded and in Ollama's double; the merged weights are what parity compares with."""
    from trainer.settings import StudentSettings

    adapted, base, adapter = adapted_model(tmp_path / "lora")
    weights = run.stage("train") / "model"
    tokenizer_files = weights.resolve()
    weights.unlink()
    shutil.copytree(tokenizer_files, weights)
    adapted.merge_and_unload().save_pretrained(weights)
    folder = run.stage("export")
    for name in ("model.gguf", "base.gguf"):
        (folder / name).unlink()
    shutil.copyfile(base, folder / "base.gguf")
    shutil.copyfile(adapter, folder / "adapter.gguf")
    exported = read_json(folder / "summary.json")
    exported["base"]["sha256"] = sha256_file(folder / "base.gguf")
    exported["model"]["sha256"] = sha256_file(folder / "adapter.gguf")
    write_json(folder / "summary.json", exported | {"deliver": "adapter"})
    student = StudentSettings(context=512, max_tokens=12, deliver="adapter")
    settings = run.task.settings.model_copy(update={"student": student})
    here = replace(run, task=replace(run.task, settings=settings))
    register.run(here, local=EmbeddedRuntime())
    assert parity(here)["answers_equal"] >= 0.8, "random weights, so near-ties may fall either way"
    written = recorded(folder.parent)["model"]
    assert written.sha256 == exported["model"]["sha256"]
    assert (written.gguf or "").endswith("base.gguf")
    assert (written.adapter or "").endswith("adapter.gguf")
    engine = Llama()
    try:
        with OllamaDouble(tmp_path / "blobs", engine) as double:
            register.run(here, local=Ollama(double.url))
            assert parity(here)["answers_equal"] >= 0.8
            assert parity(here)["evidence"]["gguf_answers_equal"] >= 0.8
    finally:
        engine.close()
