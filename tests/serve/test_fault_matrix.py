"""Every fault of the local model with every fault of the teacher: a right answer or one clear error, and journal
and counters that say the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve.config import Config, LocalRules, TaskRules, TeacherRules
from serve.settings import Settings
from tests.serve.endpoint_support import (
    TEACHER_PIECES,
    UNSURE,
    Hybrid,
    Model,
    as_chunks,
    completion,
    events,
    hybrid,
    local_model,
    local_text,
    question,
    status,
    streamed,
    teacher_model,
)
from tests.serve.release_support import write_release

Behave = Callable[[Model, dict[str, Any]], Response]


def plain(code: int, content: bytes, kind: str = "application/json", **headers: str) -> Behave:
    return lambda *_: Response(content, code, headers, kind)


def stalled(_: Model, body: dict[str, Any]) -> Response:
    """Begins, and then says nothing more."""

    async def pieces() -> AsyncIterator[bytes]:
        if body.get("stream"):
            yield b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
        else:
            yield b'{"choices": '
        await asyncio.sleep(30)

    return StreamingResponse(
        pieces(), media_type="text/event-stream" if body.get("stream") else "application/json"
    )


def cut(_: Model, body: dict[str, Any]) -> Response:
    """Ends in the middle."""
    answer = completion(body["model"], local_text(), None, UNSURE)
    if body.get("stream"):
        return streamed(as_chunks(answer)[:2], done=False)
    return Response(json.dumps(answer)[:-20], media_type="application/json")


FAULTS: dict[str, Behave] = {
    "429": status(429, "slow down", {"Retry-After": "7"}).behave,
    "500": status(500).behave,
    "404": status(404, "no such model").behave,
    "stalled": stalled,
    "cut": cut,
    "malformed": plain(200, b"{nonsense"),
    "malformed events": plain(200, b"data: {nonsense\n\ndata: [DONE]\n\n", "text/event-stream"),
    "wrong content type": plain(200, b"<html>hello</html>", "text/html"),
    "empty": plain(200, b""),
    "no choices": plain(200, b'{"choices": []}'),
    "error in 200": lambda *_: JSONResponse({"error": {"message": "overloaded"}}),
}
PAIRS = [(local, teacher) for local in (*FAULTS, "well") for teacher in (*FAULTS, "well")]


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    return local_model(UNSURE), teacher_model()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, models: tuple[Model, Model]) -> Iterator[Hybrid]:
    home = tmp_path_factory.mktemp("home")
    write_release(home / "releases")
    config = Config(
        defaults=TaskRules(audit=0),
        teacher=TeacherRules(read_s=0.3, retries=0, failures=100_000),
        local=LocalRules(read_s=0.3),
    )
    with hybrid(home, *models, Settings(home, config=config)) as found:
        yield found


def answered(served: Hybrid) -> float:
    """Requests that the counters know of, whatever became of them."""
    lines = served.client.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith("homestill_requests_total{")
    )


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("local", "teacher"), PAIRS)
def test_a_right_answer_or_one_clear_error(
    served: Hybrid, models: tuple[Model, Model], *, local: str, teacher: str, stream: bool
) -> None:
    well = (local_model(UNSURE).behave, teacher_model().behave)
    models[0].behave = FAULTS.get(local, well[0])
    models[1].behave = FAULTS.get(teacher, well[1])
    before, counted = len(served.entries()), answered(served)
    response = served.ask(question(stream=stream))
    entries = served.entries()[before:]
    assert len(entries) == 1
    assert answered(served) == counted + 1
    entry = entries[0]
    broken = stream and response.status_code == 200 and "error" in events(response)[-1]
    if teacher == "well":
        assert (response.status_code, entry.route, entry.status) == (200, "teacher", 200)
        assert said(response, stream=stream) == "".join(TEACHER_PIECES)
    elif broken:  # the teacher had begun: after its first event there is no way back
        assert (entry.route, entry.status) == ("teacher", 502)
    elif local == "well":
        assert (response.status_code, entry.route, entry.degraded) == (200, "local", True)
        assert said(response, stream=stream) == local_text()
    elif teacher in ("404",):
        assert response.status_code == entry.status
        assert response.status_code in (404, 503)
    else:
        error = response.json()["error"]
        assert (response.status_code, entry.status, entry.route) == (503, 503, None)
        assert "Teacher:" in error["message"]
        assert "Local:" in error["message"]
        assert response.headers.get("retry-after") == ("7" if teacher == "429" else None)


def said(response: Any, *, stream: bool) -> str:
    if not stream:
        text: str = response.json()["choices"][0]["message"]["content"]
        return text
    *chunks, end = events(response)
    assert end == "[DONE]"
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
