"""Embeddings come from the task's local runtime, or from nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.embeddings import Embeddings
from serve.errors import UpstreamBusy, UpstreamDown, UpstreamError, UpstreamRefused
from serve.records.entry import Entry
from tests.serve.api.dialect_support import chat, client, tasks

pytestmark = pytest.mark.asyncio
VECTORS = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]}


class Runtime:
    """Makes embeddings, or fails."""

    def __init__(self, error: UpstreamError | None = None) -> None:
        self.error = error
        self.asked: list[Any] = []

    async def embeddings(self, body: Any) -> dict[str, Any]:
        self.asked.append(body)
        if self.error:
            raise self.error
        return dict(VECTORS)


async def post(
    tmp_path: Path,
    local: Runtime | None,
    keys: tuple[str, ...] = (),
    record: Callable[[Entry], None] = lambda _: None,
    **more: Any,
) -> httpx.Response:
    api = Embeddings(chat(tmp_path, keys=keys), tasks(tmp_path, local=local), record)  # type: ignore[arg-type]
    with client(api.routes()) as asking:
        return await asking.post("/v1/embeddings", json={"model": "tickets", "input": "Hello", **more})


async def test_the_request_is_passed_on_whole(tmp_path: Path) -> None:
    local = Runtime()
    response = await post(tmp_path, local, dimensions=8)
    assert response.json() == VECTORS
    assert local.asked == [{"model": "tickets", "input": "Hello", "dimensions": 8}]
    assert response.headers["x-homestill-route"] == "local"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UpstreamRefused("local", "the embedded runtime makes no embeddings"), 501, None),
        (UpstreamRefused("local", "too long", status=400), 400, None),
        (UpstreamDown("local", "it is out"), 503, "local_down"),
        (UpstreamBusy("local", "it is full", retry_after="3"), 503, "local_busy"),
    ],
)
async def test_errors_have_openais_shape(
    tmp_path: Path, error: UpstreamError, status: int, code: str | None
) -> None:
    response = await post(tmp_path, Runtime(error))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["message"] == str(error)
    assert response.headers.get("retry-after") == error.retry_after


async def test_who_does_not_run_or_is_not_known(tmp_path: Path) -> None:
    assert (await post(tmp_path, None)).status_code == 503
    assert (await post(tmp_path, Runtime(), model="other")).status_code == 404
    assert (await post(tmp_path, Runtime(), keys=("sk-good",))).status_code == 401


@pytest.mark.parametrize(
    ("more", "param"), [({"input": None}, "input"), ({"input": [1.5]}, "input"), ({"model": 5}, "model")]
)
async def test_faults(tmp_path: Path, more: dict[str, Any], param: str) -> None:
    local = Runtime()
    response = await post(tmp_path, local, **more)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert local.asked == []


async def test_every_request_is_recorded_without_its_texts(tmp_path: Path) -> None:
    entries: list[Entry] = []
    well = await post(tmp_path, Runtime(), record=entries.append)
    await post(tmp_path, Runtime(UpstreamDown("local", "it is out")), record=entries.append)
    assert [(entry.status, entry.route, entry.error) for entry in entries] == [
        (200, "local", None),
        (503, None, "it is out"),
    ]
    assert entries[0].id == well.headers["x-request-id"] and entries[0].endpoint == "embeddings"
    assert entries[0].messages == [] and entries[0].task == "tickets" and entries[0].latency_ms > 0
