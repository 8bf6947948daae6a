"""Two tasks on one base, each with a LoRA adapter of its own, behind one endpoint and the embedded runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve.app import create_app
from serve.records.journal import Journal
from serve.release import ReleaseInvalid, load
from serve.settings import Settings
from serve.upstreams.local import EmbeddedLocal
from serve.upstreams.upstream import connect
from tests.serve.endpoint_support import question, running
from tests.serve.release_support import write_release
from tests.serve.runtime import tiny_gguf


@contextmanager
def offline(home: Path) -> Iterator[httpx.Client]:
    """The endpoint without a teacher, so that the local models answer everything."""
    settings = Settings(home, local="embedded", offline=True)
    journal = Journal(settings.journal_url)
    app = create_app(settings, EmbeddedLocal(connect(proxies=False)), None, journal)
    try:
        with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        journal.close()


def test_each_task_is_answered_through_its_own_adapter(tmp_path: Path) -> None:
    base = tiny_gguf.write(tmp_path / "base.gguf").read_bytes()
    adapters = {
        "plain": None,
        "one": tiny_gguf.lora(tmp_path / "one.gguf", alpha=8.0).read_bytes(),
        "other": tiny_gguf.lora(tmp_path / "other.gguf", alpha=64.0).read_bytes(),
    }
    for task, lora in adapters.items():
        write_release(tmp_path / "releases", runtime="embedded", task=task, gguf=base, lora=lora)

    with offline(tmp_path) as client:
        answers = {
            task: client.post("/v1/chat/completions", json=question(max_tokens=16) | {"model": task})
            for task in adapters
        }

    assert {answer.headers["x-homestill-route"] for answer in answers.values()} == {"local"}
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers.values()}
    assert len(texts) == len(adapters)


@pytest.mark.parametrize("name", ["base.gguf", "adapter.gguf"])
def test_a_base_or_an_adapter_that_is_another_is_refused(tmp_path: Path, name: str) -> None:
    version = write_release(tmp_path / "releases", gguf=b"a base", lora=b"its adapter")
    folder = tmp_path / "releases" / "tickets" / version
    assert load(folder).lora == folder / "adapter.gguf"

    (folder / name).write_bytes(b"of another training")

    with pytest.raises(ReleaseInvalid, match=name):
        load(folder)
