"""Who holds the GPU, decided without one."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from tests.contract.ollama_double import OllamaDouble
from tests.tasks import write_task
from trainer import gpu, task
from trainer.errors import PreflightError
from trainer.pipeline import Stage
from trainer.runs import Home, Run
from trainer.traces import Store

ON_A_GPU = {"OLLAMA_HOST": "http://ollama:11434", "HOMESTILL_REQUIRE_GPU": "1"}


class TestUnload:
    def test_every_loaded_model_is_asked_to_leave(self, caplog: pytest.LogCaptureFixture) -> None:
        asked = []

        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/api/ps":
                both = [
                    {"name": "a:1", "size": 5, "size_vram": 5},
                    {"name": "b:1", "size": 5, "size_vram": 0},
                ]
                return httpx.Response(200, json={"models": both})
            asked.append(json.loads(request.content))
            said = {"role": "assistant", "content": ""}
            return httpx.Response(200, json={"message": said, "done": True, "done_reason": "unload"})

        assert gpu.unload(ON_A_GPU, httpx.MockTransport(answer)) == ["a:1", "b:1"]
        assert [(each["model"], each["keep_alive"], each["messages"]) for each in asked] == [
            ("a:1", 0, []),
            ("b:1", 0, []),
        ]
        assert "ATTENTION: Ollama runs b:1 on the CPU" in caplog.text
        assert "runs a:1" not in caplog.text

    def test_an_ollama_that_is_away_stops_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        def refuse(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        assert gpu.unload(ON_A_GPU, httpx.MockTransport(refuse)) == []
        assert "could not be asked to free the GPU" in caplog.text

    def test_other_runtimes_are_left_alone(self) -> None:
        assert gpu.unload({"HOMESTILL_LOCAL": "embedded"}) == []


def test_a_box_that_must_have_a_gpu_refuses_to_train_on_the_cpu() -> None:
    with pytest.raises(PreflightError, match="would train on the CPU"):
        gpu.check({"HOMESTILL_REQUIRE_GPU": "1"}, cuda=lambda: False)
    gpu.check({"HOMESTILL_REQUIRE_GPU": "1"}, cuda=lambda: True)
    gpu.check({"HOMESTILL_REQUIRE_GPU": "0"}, cuda=lambda: False)


def test_only_the_training_has_ollama_let_go_first(tmp_path: Path) -> None:
    loaded = task.load(write_task(tmp_path / "words"))
    with OllamaDouble(tmp_path / "blobs") as double:
        here = Run(loaded, Home(tmp_path), Store.open("sqlite://"), tmp_path, {"OLLAMA_HOST": double.url})
        seen: list[tuple[str, int]] = []
        for name in ("curate", "train", "export"):
            stage = Stage(name, lambda _: {}, lambda _, n=name: seen.append((n, len(double.log))))  # type: ignore[misc]
            gpu.freeing(stage).run(here)
    assert seen == [("curate", 0), ("train", 1), ("export", 1)]


@pytest.mark.slow
def test_cuda_is_looked_for_in_another_process() -> None:
    expected = shutil.which("nvidia-smi") is not None and "+cpu" not in version("torch")
    assert gpu.cuda_works() is expected
