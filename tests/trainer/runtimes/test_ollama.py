"""Registration with Ollama over a network that fails: every fault is survived or explained, and nothing half-made stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

from serve.runtime.embedded import Endpoint
from tests.contract import files
from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Canned
from trainer.errors import RegisterError, RuntimeUnavailable
from trainer.runtimes.local import Adapter, LocalModel
from trainer.runtimes.ollama import Ollama, check_name, host_url, parameters
from trainer.template import Template

JINJA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GO = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
TEMPLATE = Template(jinja=JINJA, go=GO, stop=["<|end|>"], tokens={"bos_token": "<s>"})


@dataclass
class Time:
    """A clock that only sleeping moves."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OllamaDouble]:
    with OllamaDouble(tmp_path / "blobs") as running:
        yield running


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def ollama(double: OllamaDouble, time: Time) -> Ollama:
    return Ollama(double.url, sleep=time.sleep, clock=time.clock, create_timeout=10.0, attempts=3)


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    return model_of(files.shell(tmp_path / "model.gguf"))


def model_of(gguf: Path) -> LocalModel:
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    return LocalModel.of(
        "tickets", "", gguf=gguf, sha256=sha256, template=TEMPLATE, context=512, max_tokens=64
    )


def passed_on(request: httpx.Request) -> httpx.Response:
    """The answer of the real server, read to its end."""
    with httpx.HTTPTransport() as transport:
        response = transport.handle_request(request)
        response.read()
        return response


def names(double: OllamaDouble) -> list[str]:
    return [model.name for model in double.models.all()]


def test_a_model_is_uploaded_created_and_tried(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    registration = ollama.register(model)
    assert registration.name == model.name == names(double)[0]
    assert registration.base_url == f"{double.url}/v1"
    asked = [(entry["method"], entry["path"].split(":")[0]) for entry in double.log]
    assert asked[:4] == [
        ("POST", "/api/show"),
        ("HEAD", "/api/blobs/sha256"),
        ("POST", "/api/blobs/sha256"),
        ("POST", "/api/create"),
    ]
    body = double.requests("POST", "/api/create")[0]["body"]
    assert body == {
        "model": model.name,
        "stream": False,
        "files": {"model.gguf": f"sha256:{model.sha256}"},
        "template": GO,
        "parameters": {"temperature": 0.0, "num_ctx": 512, "num_predict": 64, "stop": ["<|end|>"]},
    }
    smoke = double.requests("POST", "/v1/chat")[0]
    assert smoke["body"]["temperature"] == 0.0
    assert smoke["options"]["temperature"] == 0.0


def test_the_same_model_again_is_only_tried(ollama: Ollama, double: OllamaDouble, model: LocalModel) -> None:
    first = ollama.register(model)
    double.log.clear()
    assert ollama.register(model) == first
    assert double.requests("POST", "/api/create") == []
    assert double.requests("POST", "/v1/chat")


def test_a_blob_that_is_there_is_not_sent_again(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    ollama.register(model)
    ollama.register(replace(model, name="tickets:other"))
    assert len(double.requests("POST", "/api/blobs")) == 1


def test_a_name_with_other_content_is_not_overwritten(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    ollama.register(
        replace(model, template=replace(TEMPLATE, go=f"!{GO}", jinja=f"!{JINJA}", tokens={"bos_token": ""}))
    )
    with pytest.raises(RegisterError, match="is not overwritten"):
        ollama.register(model)
    assert double.models.get(model.name).template == f"!{GO}"


@pytest.mark.parametrize(
    "fault", ["cut_upload", "wrong_digest", "restart_upload", "blob_vanishes", "restart_create", "busy"]
)
def test_what_passes_is_survived(
    ollama: Ollama, double: OllamaDouble, model: LocalModel, time: Time, fault: str
) -> None:
    double.faults.set({fault: 1})
    assert ollama.register(model).name == names(double)[0]
    assert double.faults.left == {}
    assert time.slept, "a retry waits first"


def test_after_a_broken_upload_it_asks_before_sending_again(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    double.faults.set({"cut_upload": 1})
    ollama.register(model)
    asked = [entry["method"] for entry in double.log if entry["path"].startswith("/api/blobs")]
    assert asked == ["HEAD", "POST", "HEAD", "POST"]


def test_a_create_that_outlives_its_client_is_waited_for(
    double: OllamaDouble, model: LocalModel, time: Time
) -> None:

    def sleep(_: float) -> None:
        assert double.finished.wait(10)

    ollama = Ollama(double.url, sleep=sleep, clock=time.clock, create_timeout=0.3)
    double.faults.set({"slow_create": 1})
    assert ollama.register(model).name == names(double)[0]
    assert len(double.requests("POST", "/api/create")) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("cut_upload", RuntimeUnavailable, "did not take model.gguf in 3 attempts"),
        ("wrong_digest", RuntimeUnavailable, "digest mismatch"),
        ("create_error", RegisterError, "llama-quantize failed"),
        ("blob_vanishes", RuntimeUnavailable, "no such file"),
        ("bad_parameters", RegisterError, 'option "stop" must be of type array'),
        ("misdetected_template", RegisterError, "did not take the template"),
        ("busy", RuntimeUnavailable, "server busy"),
        ("token_repeat", RegisterError, "without a finish_reason"),
        ("drop", RuntimeUnavailable, "check that it runs"),
    ],
)
def test_what_lasts_is_explained_and_leaves_nothing(
    ollama: Ollama, double: OllamaDouble, model: LocalModel, *, fault: str, kind: type[Exception], text: str
) -> None:
    double.faults.set({fault: -1})
    with pytest.raises(kind, match=text):
        ollama.register(model)
    assert names(double) == []


def test_a_model_that_could_not_be_removed_is_named(
    double: OllamaDouble, model: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            raise httpx.ConnectError("gone")
        return passed_on(request)

    double.faults.set({"token_repeat": -1})
    flaky = Ollama(double.url, transport=httpx.MockTransport(answer), sleep=lambda _: None)
    with pytest.raises(RegisterError):
        flaky.register(model)
    assert f"ollama rm {model.name}" in caplog.text


def test_a_model_that_was_there_before_survives_a_failed_try(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    ollama.register(model)
    double.faults.set({"token_repeat": 1})
    with pytest.raises(RegisterError):
        ollama.register(model)
    assert names(double) == [model.name], "a release in use may be served from it"


def test_a_file_that_is_not_what_export_wrote(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    model.gguf.write_bytes(model.gguf.read_bytes() + b"x")
    with pytest.raises(RegisterError, match="export recorded"):
        ollama.register(model)
    model.gguf.unlink()
    with pytest.raises(RegisterError, match="is missing"):
        ollama.register(model)
    assert double.log == []


def test_a_file_that_is_no_model(ollama: Ollama, double: OllamaDouble, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"something else")
    with pytest.raises(RegisterError, match="not in GGUF format"):
        ollama.register(model_of(gguf))
    assert names(double) == []


def test_this_machine_is_asked_without_a_proxy(
    double: OllamaDouble, model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody is
    found = Ollama(double.url)
    assert found.version()  # by httpx
    assert found.register(model).name == model.name  # by ollama's client, and asked once


def test_nobody_at_the_address(model: LocalModel) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"check that it runs \(`ollama serve`\)"):
        Ollama("127.0.0.1:1", sleep=lambda _: None).register(model)


def test_an_address_that_is_no_ollama(model: LocalModel) -> None:
    other = httpx.MockTransport(lambda _: httpx.Response(403, text=""))
    with pytest.raises(RegisterError, match="HTTP 403"):
        Ollama("http://somewhere", transport=other, sleep=lambda _: None).register(model)


def test_a_disk_that_is_full_is_not_tried_again(model: LocalModel) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and "blobs" in request.url.path:
            return httpx.Response(500, json={"error": "write: no space left on device"})
        return httpx.Response(404, json={"error": "not found"})

    with pytest.raises(RegisterError, match="free some disk"):
        Ollama("http://somewhere", transport=httpx.MockTransport(answer), sleep=lambda _: None).register(
            model
        )


def test_serving_and_removing(ollama: Ollama, double: OllamaDouble, model: LocalModel) -> None:
    registration = ollama.register(model)
    with ollama.serving(registration) as endpoint:
        assert endpoint == Endpoint(f"{double.url}/v1", model.name)
        text = ollama.render(endpoint, [{"role": "user", "content": "Hi"}]).text
        assert text == "<|user|>Hi<|end|><|assistant|>"
    ollama.remove(model.name)
    ollama.remove(model.name)
    assert names(double) == []
    with pytest.raises(RuntimeUnavailable, match="is not in Ollama"), ollama.serving(registration):
        pass


def test_no_logprobs_are_refused(double: OllamaDouble, model: LocalModel) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        response = passed_on(request)
        if request.url.path != "/v1/chat/completions":
            return response
        value = response.json()
        value["choices"][0].pop("logprobs", None)
        return httpx.Response(200, json=value)

    old = Ollama(double.url, transport=httpx.MockTransport(answer), sleep=lambda _: None)
    with pytest.raises(RegisterError, match="gives no logprobs"):
        old.register(model)
    assert names(double) == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("ollama", "http://ollama:11434"),
        ("http://ollama", "http://ollama"),
        ("https://models.example/ollama/", "https://models.example/ollama"),
    ],
)
def test_hosts(host: str, url: str) -> None:
    assert host_url(host) == url


@pytest.mark.parametrize(
    "name", ["tickets", "-x:1", "a b:1", "x:local", "x:cloud", "x:my-cloud", "x:" + "t" * 81, "x/y:1", ""]
)
def test_names_that_ollama_would_refuse_or_never_serve(name: str) -> None:
    with pytest.raises(RegisterError, match="model name is"):
        check_name(name)


def test_names_hold_the_content(model: LocalModel) -> None:
    check_name(model.name)
    same = model_of(model.gguf)
    assert same.name == model.name
    longer = LocalModel.of(
        "tickets",
        "base",
        gguf=model.gguf,
        sha256=model.sha256,
        template=TEMPLATE,
        context=1024,
        max_tokens=64,
    )
    check_name(longer.name)
    assert longer.name.startswith("tickets:base-")
    assert longer.name[-12:] != model.name[-12:]


def test_parameters_are_strictly_typed(model: LocalModel) -> None:
    found = parameters(model)
    assert {key: type(value) for key, value in found.items()} == {
        "temperature": float,
        "num_ctx": int,
        "num_predict": int,
        "stop": list,
    }


def test_the_double_answers_through_its_engine(
    ollama: Ollama, double: OllamaDouble, model: LocalModel
) -> None:
    ollama.register(model)
    assert isinstance(double.engine, Canned)
    assert double.engine.asked[0]["prompt"].endswith("<|user|>Hello<|end|><|assistant|>")


def test_adapters_on_one_base_share_its_blob_and_take_turns_in_its_runner(
    ollama: Ollama, double: OllamaDouble, tmp_path: Path
) -> None:
    base = model_of(files.shell(tmp_path / "base.gguf", file_type=files.Q8_0))
    students = []
    for seed in (1, 2):
        adapter = files.shell(tmp_path / f"adapter{seed}.gguf", seed=seed)
        own = Adapter(adapter, hashlib.sha256(adapter.read_bytes()).hexdigest())
        students.append(
            LocalModel.of(
                "tickets",
                "",
                gguf=base.gguf,
                sha256=base.sha256,
                template=TEMPLATE,
                context=512,
                max_tokens=64,
                adapter=own,
            )
        )
    registered = [ollama.register(student) for student in students]
    assert len({base.name, *(each.name for each in registered)}) == 3
    assert [each.sha256 for each in registered] == [student.identity for student in students]
    bodies = [entry["body"] for entry in double.requests("POST", "/api/create")]
    assert [body["adapters"] for body in bodies] == [
        {"adapter.gguf": f"sha256:{student.identity}"} for student in students
    ]
    assert len({str(body["files"]) for body in bodies}) == 1
    uploads = [entry["path"][-64:] for entry in double.requests("POST", "/api/blobs")]
    assert sorted(uploads) == sorted([base.sha256, *(each.identity for each in students)])
    double.loads.clear()
    for student in [*students, *students]:
        ollama._chat.smoke(Endpoint(registered[0].base_url or "", student.name))
    assert double.loads == [student.name for student in [*students, *students]], "each turn is a load"


def test_a_damaged_adapter_is_refused(ollama: Ollama, model: LocalModel, tmp_path: Path) -> None:
    adapter = files.shell(tmp_path / "adapter.gguf", seed=1)
    with pytest.raises(RegisterError, match=r"adapter\.gguf has SHA-256"):
        ollama.register(replace(model, adapter=Adapter(adapter, "0" * 64)))
