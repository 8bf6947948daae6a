"""A carried release's model is registered as it was certified, or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve import release as releases
from serve.runtime.embedded import Endpoint
from tests.finished import finished_run
from trainer import release
from trainer.bundle.models import facts, register
from trainer.errors import RegisterError
from trainer.runs import Home, read_json, sha256_json, write_json
from trainer.runtimes.local import Kind, LocalModel, Messages, Registration, Rendered

TEMPLATE = {"jinja": "{{ messages }}", "go": "{{ .Prompt }}", "stop": ["<|eot_id|>"], "tokens": {}}


@dataclass
class FakeRuntime:
    """Notes what it is asked to register; it stands for Ollama here."""

    kind: Kind = "ollama"
    registered: list[LocalModel] = field(default_factory=list)

    def register(self, model: LocalModel) -> Registration:
        model.check()
        self.registered.append(model)
        return Registration(self.kind, model.name, model.sha256, model.context)

    def serving(self, registration: Registration) -> AbstractContextManager[Endpoint]:
        raise NotImplementedError

    def render(self, endpoint: Endpoint, messages: Messages) -> Rendered:
        raise NotImplementedError

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        raise NotImplementedError


@pytest.fixture
def made(tmp_path: Path) -> tuple[Home, str]:
    """A release whose certificate binds TEMPLATE and Ollama, and its run."""
    run = finished_run(tmp_path, train=6, calibrate=12, test=8)
    exported = run.stage("export") / "summary.json"
    write_json(exported, read_json(exported) | {"template": TEMPLATE})
    router = read_json(run.stage("certify") / "router.json")
    router["binds"] |= {"template": sha256_json(TEMPLATE), "runtime": "ollama"}
    write_json(run.stage("certify") / "router.json", router)
    release.run(run)
    run.store.close()
    version = releases.current_version(run.home.releases("words"))
    assert version is not None
    return run.home, version


def test_it_is_registered_with_its_own_template(made: tuple[Home, str]) -> None:
    home, version = made
    runtime = FakeRuntime()
    said = register(home, "words", version, facts(home, "words", version), runtime)
    (model,) = runtime.registered
    assert said == f"words: {model.name} is registered"
    assert model.gguf == home.releases("words") / version / "model.gguf"
    assert (model.template.go, model.context, model.max_tokens) == ("{{ .Prompt }}", 512, 512)


def test_another_template_is_refused(made: tuple[Home, str]) -> None:
    home, version = made
    told: dict[str, Any] = facts(home, "words", version) or {}
    with pytest.raises(RegisterError, match="binds another template"):
        register(home, "words", version, told | {"template": TEMPLATE | {"go": "other"}}, FakeRuntime())


def test_what_cannot_be_registered_is_said(made: tuple[Home, str]) -> None:
    home, version = made
    assert "train it again" in register(home, "words", version, None, FakeRuntime())
    runtime = FakeRuntime(kind="embedded")
    assert "certified with ollama" in register(home, "words", version, facts(home, "words", version), runtime)
    assert runtime.registered == []
    assert facts(home, "words", "20200101T000000Z-00000000") is None


def test_a_damaged_release_is_refused(made: tuple[Home, str]) -> None:
    home, version = made
    (home.releases("words") / version / "model.gguf").write_text("x")
    with pytest.raises(RegisterError, match="not the file that was released"):
        register(home, "words", version, facts(home, "words", version), FakeRuntime())
