"""The provider without a training: rows, settings, names, loading and unloading, and errors that are raised."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from tests.contract import files
from tests.contract.ollama_double import OllamaDouble
from tests.trainer.runtimes.test_ollama import model_of
from trainer.errors import ExportError, RuntimeUnavailable, TrainError
from trainer.provider import OllamaProvider
from trainer.provider.models import OllamaModels
from trainer.provider.tuning import student_settings
from trainer.runtimes.choice import choice


def chat(question: str, answer: str = "[[ ## label ## ]]\nodd") -> dict[str, Any]:
    roles = ("system", "user", "assistant")
    texts = ("Sort.", question, answer)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


ROWS = [chat(f"word {number}") for number in range(6)]


# settings


def test_settings_are_flat_and_later_ones_win() -> None:
    student = student_settings("b", {"epochs": 2, "quantize": "f16"}, {"epochs": 5, "rank": None})
    assert (student.base, student.quantize, student.train.epochs, student.train.rank) == ("b", "f16", 5, 16)


def test_general_data_is_found_from_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = student_settings("b", {"replay": {"data": "general.jsonl"}})
    assert student.train.replay is not None
    assert student.train.replay.data == str(tmp_path / "general.jsonl")


def test_every_faulty_setting_is_named_at_once() -> None:
    with pytest.raises(TrainError) as caught:
        student_settings("b", {"n_epochs": 3, "rank": 0, "quantize": "q2", "predictor": "sort"})
    text = str(caught.value)
    assert "predictor is no setting; use one of" in text
    assert "n_epochs is no setting; use one of" in text
    assert "epochs" in text.splitlines()[0]
    assert "rank is 0" in text
    assert "quantize is 'q2'" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({1: 2, "n": 3}, ["1 is no setting", "n is no setting"]),
        ({"replay": {"data": 5}, "rank": 0}, ["data is 5: ", "rank is 0: "]),
        ({"replay": {"data": None}}, ["data is None: "]),
        (["epochs"], ["the settings are ['epochs']; give a mapping"]),
    ],
)
def test_settings_of_a_wrong_kind_are_faults_too(given: Any, said: list[str]) -> None:
    with pytest.raises(TrainError) as caught:
        student_settings("b", given)
    assert all(one in str(caught.value) for one in said)


def test_a_home_may_be_text_and_one_that_is_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "taken").write_text("x")
    provider = OllamaProvider("b", home="~/taken", runtime="embedded", environment={})
    with pytest.raises(TrainError, match=r"home is .*/taken, where no run can be made \(.*File exists\)"):
        provider.lm()


def test_a_seed_that_is_no_number_is_named_with_the_other_faults(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"name is 'X';.*\nseed is 'a'; use a whole number"):
        OllamaProvider("b", name="X", seed="a", home=tmp_path, runtime="embedded", environment={})  # type: ignore[arg-type]


def test_a_name_that_no_runtime_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="name is 'My Model'; use a-z"):
        OllamaProvider("b", name="My Model", home=tmp_path, runtime="embedded", environment={})


# the provider


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OllamaDouble]:
    with OllamaDouble(tmp_path / "blobs") as running:
        yield running


@pytest.fixture
def registered(double: OllamaDouble, tmp_path: Path) -> str:
    return OllamaModels(double.url).runtime.register(model_of(files.shell(tmp_path / "m.gguf"))).name


@pytest.fixture
def provider(double: OllamaDouble, tmp_path: Path) -> Iterator[OllamaProvider]:
    with OllamaProvider("some/base", home=tmp_path / "home", runtime=double.url, environment={}) as made:
        yield made


def test_launch_loads_and_kill_unloads(
    provider: OllamaProvider, double: OllamaDouble, registered: str
) -> None:
    lm = dspy.LM(f"ollama_chat/{registered}", provider=provider)
    lm.launch({"keep_alive": 60})
    assert list(double.loaded.values()) == [registered]
    assert double.requests("POST", "/api/chat")[-1]["body"]["keep_alive"] == 60
    assert lm.kwargs["api_base"] == f"{double.url}/v1"
    lm.kill()
    assert double.loaded == {}
    lm.kill()


def test_a_model_answers_greedily_where_it_is_reached(
    provider: OllamaProvider, double: OllamaDouble, registered: str
) -> None:
    lm = provider.lm(registered, cache=False)
    assert lm("Hello") == ["A canned answer."]
    sent = double.requests("POST", "/v1/chat/completions")[-1]["body"]
    assert (sent["temperature"], sent["max_tokens"]) == (0.0, 512)


def test_what_an_lm_says_itself_is_kept(provider: OllamaProvider, registered: str) -> None:
    lm = provider.lm(registered, temperature=0.5, max_tokens=9)
    assert (lm.kwargs["temperature"], lm.kwargs["max_tokens"]) == (0.5, 9)


def test_no_key_of_the_users_goes_to_the_runtime(
    provider: OllamaProvider, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    lm = dspy.LM(f"openai/{registered}", provider=provider, cache=False)
    lm.launch()
    assert lm("Hello") == ["A canned answer."]
    assert lm.kwargs["api_key"] == "none"


def test_an_unknown_model_is_killed_in_silence_and_launched_with_an_error(provider: OllamaProvider) -> None:
    lm = dspy.LM("ollama_chat/nobody", provider=provider)
    lm.kill()
    with pytest.raises(RuntimeUnavailable, match=r"cannot load nobody: .*ollama list"):
        lm.launch()


def nowhere(home: Path, environment: dict[str, str]) -> OllamaProvider:
    """A provider on an Ollama that does not run."""
    return OllamaProvider("b", home=home, runtime="127.0.0.1:9", environment=environment)


def test_no_ollama_is_said(tmp_path: Path) -> None:
    lm = dspy.LM("ollama_chat/x", provider=nowhere(tmp_path, {}))
    with pytest.raises(RuntimeUnavailable, match="check that it runs"):
        lm.kill()


def test_a_copy_of_a_program_shares_the_box(provider: OllamaProvider, registered: str) -> None:
    student = dspy.Predict("text -> label")
    student.set_lm(provider.lm(registered))
    assert copy.deepcopy(student).lm.provider is provider
    assert student.deepcopy().lm.kwargs["api_base"] == student.lm.kwargs["api_base"]


def test_a_whole_program_can_be_saved(tmp_path: Path) -> None:
    environment = {"OPENAI_API_KEY": "sk-of-the-user"}
    options: dict[str, Any] = {"home": tmp_path / "home", "runtime": "embedded", "student": {"epochs": 7}}
    with OllamaProvider("b", environment=environment, **options) as provider:
        program = dspy.Predict("text -> label")
        program.set_lm(provider.lm("student:1"))
        program.save(tmp_path / "saved", save_program=True)
        assert not any(b"sk-of" in file.read_bytes() for file in (tmp_path / "saved").iterdir())
    loaded = dspy.load(tmp_path / "saved", allow_pickle=True)
    with loaded.lm.provider as again:
        assert (again._workshop.home.root, again._settings.train.epochs) == (tmp_path / "home", 7)
        again.reach(loaded.lm)
        assert loaded.lm.kwargs["api_base"] == again.models.api_base


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"HOMESTILL_LOCAL": "embedded"}, "embedded"),
        ({}, "embedded"),
        ({"OLLAMA_HOST": "box:1234"}, "ollama"),
    ],
)
def test_the_runtime_is_the_environments(environment: dict[str, str], kind: str, tmp_path: Path) -> None:
    with OllamaProvider("b", home=tmp_path, environment=environment) as provider:
        assert provider.models.runtime.kind == kind
        if kind == "ollama":
            assert provider.models.api_base == "http://box:1234/v1"


@pytest.mark.parametrize("engine", ["auto", "litellm"])
def test_a_saved_program_that_was_given_no_model_again_asks_no_cloud(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DSPy saves no api_base: what is asked then follows from the model's name alone."""
    with OllamaProvider("b", home=tmp_path, runtime="embedded", environment={}) as provider:
        program = dspy.Predict("text -> label")
        program.set_lm(provider.lm("student:0123456789ab", cache=False, num_retries=0, engine=engine))
        program.save(tmp_path / "program.json")
    loaded, asked, look_up = dspy.Predict("text -> label"), [], socket.getaddrinfo
    loaded.load(tmp_path / "program.json")

    def recorded(host: Any, *args: Any, **options: Any) -> Any:
        asked.append(host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", recorded)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-user")
    with pytest.raises(dspy.utils.exceptions.LMError):
        loaded(text="private")
    assert set(asked) == {"localhost"}
    with OllamaProvider("b", home=tmp_path, runtime="embedded", environment={}) as provider:
        for predictor in loaded.predictors():  # as docs/dspy.md says
            predictor.lm = provider.lm(predictor.lm.model)
        assert loaded.lm.kwargs["api_base"] == provider.models.api_base


def test_a_server_of_somebody_else_cannot_be_registered_with(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="cannot be registered"):
        OllamaProvider("b", home=tmp_path, environment={"HOMESTILL_LOCAL": "http://vllm:8000"})


# errors are raised


def test_result_raises_what_dspy_would_return(provider: OllamaProvider) -> None:
    job = dspy.LM("ollama_chat/x", provider=provider).finetune(ROWS, TrainDataFormat.COMPLETION)
    with pytest.raises(TrainError, match="only chat rows"):
        job.result(timeout=30)
    job.thread.join()
    assert job.status() is TrainingStatus.failed
    assert job.cancel() is False


def test_a_setting_that_is_none_is_raised(provider: OllamaProvider) -> None:
    job = dspy.LM("ollama_chat/x", provider=provider).finetune(ROWS, "chat", {"n_epochs": 3})
    with pytest.raises(TrainError, match="n_epochs is no setting"):
        job.result(timeout=30)
    job.thread.join()


def test_what_would_stop_a_training_is_found_before_a_teacher_is_asked(
    provider: OllamaProvider, tmp_path: Path
) -> None:
    provider.check({"epochs": 2})
    with pytest.raises(TrainError, match="n_epochs is no setting"):
        provider.check({"n_epochs": 2})
    with pytest.raises(RuntimeUnavailable, match="tell its version"):
        nowhere(tmp_path, {}).check()


def test_a_missing_converter_or_runtime_is_found_before_the_training(tmp_path: Path) -> None:
    without_converter = nowhere(tmp_path, {"HOMESTILL_LLAMA_CPP": str(tmp_path)})
    with pytest.raises(ExportError, match="run scripts/install"):
        dspy.LM("ollama_chat/x", provider=without_converter).finetune(ROWS, "chat").result(timeout=30)
    with pytest.raises(RuntimeUnavailable, match="tell its version"):
        dspy.LM("ollama_chat/x", provider=nowhere(tmp_path, {})).finetune(ROWS, "chat").result(timeout=30)
    assert not (tmp_path / "runs").exists()


def test_bootstrap_finetune_raises_too(provider: OllamaProvider) -> None:
    student = dspy.Predict("text -> label")
    student.set_lm(dspy.LM("ollama_chat/x", provider=provider))
    teacher = dspy.Predict("text -> label")
    teacher.set_lm(dspy.utils.DummyLM([{"label": "odd"}] * 2))
    examples = [dspy.Example(text=str(number), label="odd").with_inputs("text") for number in range(2)]
    optimizer = dspy.BootstrapFinetune(metric=lambda *_: False, num_threads=1)
    with pytest.raises(TrainError, match="0 rows are left to learn from"):
        optimizer.compile(student, trainset=examples, teacher=teacher)


@pytest.mark.parametrize(("runtime", "asked"), [("embedded", "embedded"), ("127.0.0.1:9", "ollama")])
def test_what_is_asked_of_a_runtime_is_asked_of_the_given_one(
    tmp_path: Path, runtime: str, asked: str
) -> None:
    """Some bases are served by the embedded runtime alone; the environment may name another one."""
    environment = {"OLLAMA_HOST": "127.0.0.1:1"} if asked == "embedded" else {}
    made = OllamaProvider("b", home=tmp_path, runtime=runtime, environment=environment)
    assert choice(made._workshop.environment) == asked
