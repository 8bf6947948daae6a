"""What one package can do beyond the suite that all share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="needs gguf, to write a model")

from tests.clients import backends
from tests.clients.backends import TASK, TEXT, Backend
from tests.clients.clients import KEY

openai = pytest.importorskip("openai", reason="a client")
ollama = pytest.importorskip("ollama", reason="a client")

pytestmark = [  # what the packages warn of is their own
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with backends.server(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def of_openai(backend: Backend) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{backend.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def of_ollama(backend: Backend) -> Iterator[Any]:
    client = ollama.Client(backend.url, headers={"Authorization": f"Bearer {KEY}"})
    yield client
    client._client.close()


class TestOpenAI:
    def test_completions(self, of_openai: Any) -> None:
        whole = of_openai.completions.create(model=TASK, prompt="Once", logprobs=1, temperature=0)
        assert (whole.choices[0].text, whole.object) == (TEXT, "text_completion")
        assert "".join(whole.choices[0].logprobs.tokens) == TEXT
        pieces = list(of_openai.completions.create(model=TASK, prompt="Once", stream=True, echo=True))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == f"Once{TEXT}"

    def test_a_completion_with_a_suffix_is_refused(self, of_openai: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="suffix"):
            of_openai.completions.create(model=TASK, prompt="Once", suffix="end")

    def test_models(self, of_openai: Any) -> None:
        assert [model.id for model in of_openai.models.list()] == [TASK]
        with pytest.raises(openai.NotFoundError):
            of_openai.models.retrieve("other")

    def test_the_decision_is_in_headers_and_body(self, of_openai: Any) -> None:
        asking = of_openai.chat.completions.with_raw_response
        raw = asking.create(model=TASK, messages=[{"role": "user", "content": "Hello"}])
        assert raw.headers["x-homestill-route"] == raw.parse().homestill["route"] == "local"

    def test_the_embedded_runtime_says_that_it_makes_no_embeddings(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
        with (
            backends.embedded(tmp_path) as backend,
            openai.OpenAI(base_url=f"{backend.url}/v1", api_key=KEY, max_retries=0) as client,
            pytest.raises(openai.APIStatusError, match="makes no embeddings") as caught,
        ):
            client.embeddings.create(model=TASK, input="Hello")
        assert caught.value.status_code == 501


class TestOllama:
    def test_generate(self, of_ollama: Any) -> None:
        whole = of_ollama.generate(TASK, "Hello", system="Be kind.", options={"temperature": 0})
        assert (whole.response, whole.done) == (TEXT, True)
        *pieces, last = list(of_ollama.generate(TASK, "Hello", stream=True))
        assert "".join(piece.response for piece in pieces) == TEXT
        assert last.eval_count > 0

    def test_models(self, of_ollama: Any) -> None:
        (listed,) = of_ollama.list().models
        assert (listed.model, listed.details.format) == (f"{TASK}:latest", "gguf")
        assert listed.modified_at is not None
        shown = of_ollama.show(f"{TASK}:latest")
        assert shown.modelinfo["homestill.context_length"] == 512
        assert "completion" in shown.capabilities
        (running,) = of_ollama.ps().models
        assert running.name == f"{TASK}:latest"

    def test_loading(self, of_ollama: Any) -> None:
        assert of_ollama.chat(TASK).done_reason == "load"
        assert of_ollama.generate(TASK, keep_alive=0).done_reason == "unload"

    def test_what_is_not_offered_says_so(self, of_ollama: Any) -> None:
        for call in (of_ollama.pull, of_ollama.push, of_ollama.delete):
            with pytest.raises(ollama.ResponseError, match="not offered") as caught:
                call(TASK)
            assert caught.value.status_code == 501
        with pytest.raises(ollama.ResponseError, match="/v1/embeddings"):
            of_ollama.embed(TASK, "Hello")


@pytest.mark.slow
class TestDSPy:
    def test_a_program(self, backend: Backend) -> None:
        dspy = pytest.importorskip("dspy", reason="a client")
        with dspy.context(lm=self.lm(dspy, backend)):
            assert dspy.Predict("question -> ok: bool")(question="Is it well?").ok is True

    def test_a_program_that_streams(self, backend: Backend) -> None:
        dspy = pytest.importorskip("dspy", reason="a client")
        with dspy.context(lm=self.lm(dspy, backend)):
            program = dspy.streamify(dspy.Predict("question -> ok: bool"))

            async def parts() -> list[Any]:
                return [part async for part in program(question="Is it well?")]

            *chunks, prediction = asyncio.run(parts())
        assert chunks
        assert prediction.ok is True

    @staticmethod
    def lm(dspy: Any, backend: Backend) -> Any:
        known = {"api_base": f"{backend.url}/v1", "api_key": KEY, "cache": False, "num_retries": 0}
        return dspy.LM(f"openai/{TASK}", **known)
