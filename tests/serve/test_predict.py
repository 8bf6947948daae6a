"""A task's program runs on the hybrid: typed in, typed out, every call routed and told of."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serve import predict_program
from serve.errors import ApiError
from serve.release import current
from tests.serve.predict_support import (
    FILES,
    OUTPUTS,
    PROGRAM,
    Asked,
    Endpoint,
    FakeRouter,
    release,
    said,
    usual,
)

ONE = {"text": "hello", "limit": 2}
Work = Callable[[Endpoint], Awaitable[Any]]


def at(home: Path, router: FakeRouter, work: Work, **more: Any) -> Any:
    """Run something against the endpoint, whose release must have been written."""

    async def inside() -> Any:
        async with Endpoint(home, router, **more) as endpoint:
            return await work(endpoint)

    return asyncio.run(inside())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    release(tmp_path / "releases")
    return tmp_path


def test_outputs_are_typed_and_every_call_says_who_answered(home: Path) -> None:
    router = FakeRouter()
    response = at(home, router, lambda endpoint: endpoint.post(ONE))
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["outputs"] == OUTPUTS | {"verdict": True, "word": "one"}
    summary = body["homestill"]
    calls = [(call["predictor"], call["route"], call["confidence"]) for call in summary["calls"]]
    assert calls == [("read", "local", 0.9), ("judge", "teacher", 0.4)]
    assert (summary["route"], summary["reason"], summary["confidence"]) == ("mixed", "low_confidence", 0.4)
    assert (summary["cost_usd"], summary["guarantee"], summary["degraded"]) == (0.002, "0.95@0.9", False)
    assert summary["calls"][0]["usage"]["prompt_tokens"] == 7


def test_headers_say_what_the_body_says(home: Path) -> None:
    response = at(home, FakeRouter(), lambda endpoint: endpoint.post(ONE))
    assert response.headers["x-homestill-route"] == "mixed"
    assert response.headers["x-homestill-degraded"] == "false"
    assert response.headers["x-request-id"].startswith("req_")


def test_calls_are_asked_as_certified_and_journaled_under_the_request(home: Path) -> None:
    router = FakeRouter()

    async def with_header(endpoint: Endpoint) -> Any:
        return await endpoint.post(ONE, **{"x-homestill-egress": "never"})

    identity = at(home, router, with_header).headers["x-request-id"]
    assert [asked.identity for asked in router.asked] == [f"{identity}-1", f"{identity}-2"]
    assert {(asked.endpoint, asked.egress) for asked in router.asked} == {("predict", "never")}
    body = router.asked[0].body
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("tickets", 0.5, 777)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_a_program_whose_calls_all_went_one_way_says_so(home: Path) -> None:
    router = FakeRouter(route=lambda _: "local")
    summary = at(home, router, lambda endpoint: endpoint.post(ONE)).json()["homestill"]
    assert (summary["route"], summary["reason"], summary["confidence"]) == ("local", "confident", 0.9)


def test_a_local_answer_that_is_not_proven_shows_in_the_summary(home: Path) -> None:
    unproven = {"reason": "offline", "guarantee": "none", "confidence": None}
    router = FakeRouter(
        route=lambda _: "local", more=lambda asked: unproven if asked.predictor == "judge" else {}
    )
    summary = at(home, router, lambda endpoint: endpoint.post(ONE)).json()["homestill"]
    assert (summary["route"], summary["reason"]) == ("local", "offline")
    assert (summary["guarantee"], summary["confidence"]) == ("none", None)


def test_an_unparsable_answer_is_the_programs_error_and_is_not_asked_again(home: Path) -> None:
    router = FakeRouter(lambda _: "no markers")
    response = at(home, router, lambda endpoint: endpoint.post(ONE))
    assert response.status_code == 502
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("program_error", "server_error")
    assert "AdapterParseError" in error["message"]
    assert len(router.asked) == 1
    assert response.json()["homestill"]["calls"][0]["predictor"] == "read"


def test_all_faults_of_the_inputs_come_at_once(home: Path) -> None:
    router = FakeRouter()
    response = at(home, router, lambda endpoint: endpoint.post({"limit": "two", "extra": 1}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    for part in ("text is missing", "extra is no input; send text, limit", "limit: Input should be a valid"):
        assert part in error["message"]
    assert router.asked == []


def test_an_error_of_the_program_is_told_by_type_and_first_line(home: Path) -> None:
    response = at(home, FakeRouter(), lambda endpoint: endpoint.post({"text": "break", "limit": 1}))
    assert response.status_code == 502
    message = response.json()["error"]["message"]
    assert "ValueError: cannot read this;" in message
    assert "second line" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("status", "code"), [(429, "insufficient_quota"), (503, "no_model_available")])
def test_a_model_that_is_out_keeps_its_status(home: Path, status: int, code: str) -> None:
    def out(asked: Asked) -> str:
        if asked.predictor == "judge":
            raise ApiError(status, "out", code=code, headers={"Retry-After": "7"})
        return usual(asked)

    router = FakeRouter(out)
    response = at(home, router, lambda endpoint: endpoint.post(ONE))
    assert (response.status_code, response.headers["retry-after"]) == (status, "7")
    assert response.json()["error"]["code"] == code
    assert [call["predictor"] for call in response.json()["homestill"]["calls"]] == ["read"]
    assert response.headers["x-request-id"] + "-2" == router.asked[-1].identity


@pytest.mark.parametrize("instead", ["dspy.Prediction(tags=[])", "self.read(text=text, limit=0)"])
def test_a_program_that_goes_on_after_an_outage_gives_no_answer(tmp_path: Path, instead: str) -> None:
    calling = "        found = self.read(text=text, limit=limit)\n"
    caught = f"        try:\n    {calling}        except Exception:\n            return {instead}\n"
    release(tmp_path / "releases", {"program.py": PROGRAM.replace(calling, caught)})

    def out(_: Asked) -> str:
        raise ApiError(503, "both out")

    router = FakeRouter(out)
    response = at(tmp_path, router, lambda endpoint: endpoint.post(ONE))
    assert (response.status_code, response.json()["error"]["message"]) == (503, "both out")
    assert len(router.asked) == 1


def test_a_program_may_answer_an_overlong_prompt_in_another_way(tmp_path: Path) -> None:
    calling = "        found = self.read(text=text, limit=limit)\n"
    caught = (
        f"        try:\n    {calling}        except dspy.ContextWindowExceededError:\n"
        "            found = self.read(text='less', limit=limit)\n"
    )
    release(tmp_path / "releases", {"program.py": PROGRAM.replace(calling, caught)})

    def longest(asked: Asked) -> str:
        if asked.predictor == "read" and asked.text == "much":
            raise ApiError(400, "too long", code="context_length_exceeded")
        return usual(asked)

    response = at(tmp_path, FakeRouter(longest), lambda endpoint: endpoint.post({"text": "much", "limit": 1}))
    assert response.status_code == 200, response.text
    assert response.json()["outputs"]["count"] == 3


def test_a_task_without_a_release_is_unknown(home: Path) -> None:
    response = at(home, FakeRouter(), lambda endpoint: endpoint.post(ONE, "nothing"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_batch_keeps_order_and_each_row_has_its_own_error(home: Path) -> None:
    rows = [{"text": f"row {number}", "limit": number} for number in range(6)]
    rows[2] = {"text": "break", "limit": 1}
    rows[4] = {"limit": 1}

    def by_row(asked: Asked) -> str:
        return said(**OUTPUTS | {"tags": [asked.text]}) if asked.predictor == "read" else said(verdict=True)

    router = FakeRouter(by_row)
    response = at(home, router, lambda endpoint: endpoint.post({"batch": rows}))
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    right = [number for number in range(6) if number not in (2, 4)]
    assert [results[number]["outputs"]["tags"] for number in right] == [[f"row {each}"] for each in right]
    assert results[2]["error"]["code"] == "program_error"
    assert results[4]["error"]["message"] == "text is missing; send it"
    assert response.json()["homestill"]["cost_usd"] == pytest.approx(4 * 0.002)
    identity = response.headers["x-request-id"]
    assert {asked.identity for asked in router.asked} == {
        f"{identity}-{number + 1}-{call}" for number in right for call in (1, 2)
    }


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_rows_than_wished_are_under_way(home: Path, at_once: int) -> None:
    begun: list[int] = []

    async def work(endpoint: Endpoint) -> Any:
        async def count(asked: Asked) -> str:
            begun.append(endpoint.predict.running)
            return usual(asked)

        router.answer = count
        return await endpoint.post({"batch": [ONE] * 6, "concurrency": at_once}, "tickets/batch")

    router = FakeRouter()
    response = at(home, router, work)
    assert response.status_code == 200
    assert max(begun) == at_once


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"batch": []}, "batch is []"),
        ({"batch": {"text": "x"}}, "batch is {"),
        ({"batch": [ONE], "concurrency": 17}, "concurrency is 17; use 1 to 16"),
        ({"batch": [ONE], "concurrency": True}, "concurrency is true"),
        ({"batch": [ONE], "text": "x"}, "text is no field of a batch"),
    ],
)
def test_a_batch_at_fault_is_refused(home: Path, body: dict[str, Any], part: str) -> None:
    response = at(home, FakeRouter(), lambda endpoint: endpoint.post(body))
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]


def test_concurrent_predictions_do_not_mix(home: Path) -> None:
    def by_text(asked: Asked) -> str:
        return said(**OUTPUTS | {"tags": [asked.text]}) if asked.predictor == "read" else said(verdict=True)

    router = FakeRouter(by_text)

    async def many(endpoint: Endpoint) -> list[Any]:
        return await asyncio.gather(*(endpoint.post({"text": f"t{n}", "limit": n}) for n in range(24)))

    responses = at(home, router, many)
    for number, response in enumerate(responses):
        assert response.json()["outputs"]["tags"] == [f"t{number}"]
        identity = response.headers["x-request-id"]
        mine = [asked.text for asked in router.asked if str(asked.identity).startswith(f"{identity}-")]
        assert mine == [f"t{number}"] * 2


def test_a_new_release_brings_its_program_and_the_old_one_is_let_go(tmp_path: Path) -> None:
    first = release(tmp_path / "releases")
    changed = {"helpers.py": FILES["helpers.py"].replace('"one"', '"two"')}

    async def both(endpoint: Endpoint) -> list[Any]:
        before = await endpoint.post(ONE)
        (old,) = packages() - others
        second = release(tmp_path / "releases", changed, stamp="20261120T231500Z")
        await endpoint.tasks.refresh()
        after = await endpoint.post(ONE)
        gc.collect()  # the program before refers to itself
        (new,) = packages() - others
        assert new != old
        assert [each.json()["homestill"]["release"] for each in (before, after)] == [first, second]
        return [each.json()["outputs"]["word"] for each in (before, after)]

    gc.collect()
    others = packages()
    assert at(tmp_path, FakeRouter(), both) == ["one", "two"]


def packages() -> set[str]:
    """Of the programs that are loaded."""
    return {name for name in sys.modules if name.startswith("homestill_") and "." not in name}


def test_a_program_is_let_go_while_another_thread_imports(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Importing(str):
        """A module's name; to look at it is the moment in which another thread imports."""

        def partition(self, sep: str, /) -> tuple[str, str, str]:
            monkeypatch.setitem(sys.modules, f"another_{len(sys.modules)}", sys)
            return super().partition(sep)

    monkeypatch.setitem(sys.modules, Importing("a_module"), sys)
    monkeypatch.setitem(sys.modules, "a_last_module", sys)
    found = current(home / "releases" / "tickets")
    assert found is not None
    predict_program.Sources("homestill_let_go", found).forget()


def test_a_prediction_under_way_ends_with_the_program_that_it_began_with(tmp_path: Path) -> None:
    release(tmp_path / "releases")
    changed = {"helpers.py": FILES["helpers.py"].replace('"one"', '"two"')}

    async def work(endpoint: Endpoint) -> str:
        began, go_on = asyncio.Event(), asyncio.Event()

        async def held(asked: Asked) -> str:
            if asked.text == "first":
                began.set()
                await go_on.wait()
            return usual(asked)

        router.answer = held
        first = asyncio.create_task(endpoint.post({"text": "first", "limit": 1}))
        await began.wait()
        release(tmp_path / "releases", changed, stamp="20261120T231500Z")
        await endpoint.tasks.refresh()
        second = await endpoint.post(ONE)
        gc.collect()
        go_on.set()
        return f"{(await first).json()['outputs']['word']} {second.json()['outputs']['word']}"

    router = FakeRouter()
    assert at(tmp_path, router, work) == "one two"


def test_code_that_is_not_the_released_one_is_never_run(home: Path) -> None:
    async def tampered(endpoint: Endpoint) -> Any:
        (helpers,) = (home / "releases" / "tickets").glob("*/helpers.py")
        helpers.write_text("raise SystemExit")
        return await endpoint.post(ONE)

    response = at(home, FakeRouter(), tampered)
    assert response.status_code == 503
    assert "helpers.py is not the file that was released" in response.json()["error"]["message"]


def test_a_program_that_does_not_load_says_why(tmp_path: Path) -> None:
    release(tmp_path / "releases", {"helpers.py": "import a_module_that_nobody_has"})
    response = at(tmp_path, FakeRouter(), lambda endpoint: endpoint.post(ONE))
    assert response.status_code == 502
    message = response.json()["error"]["message"]
    assert "cannot be loaded: ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in message


def test_a_client_that_leaves_ends_the_calls(home: Path) -> None:
    began = asyncio.Event()
    ended: list[str] = []

    async def held(asked: Asked) -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(str(asked.identity))
        return ""

    router = FakeRouter(held)

    async def leave(endpoint: Endpoint) -> list[dict[str, Any]]:
        parts = iter([{"type": "http.request", "body": b'{"text": "x", "limit": 1}', "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            part = next(parts, None)
            if part is None:
                await began.wait()
                return {"type": "http.disconnect"}
            return part

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/predict/tickets",
            "headers": [],
            "query_string": b"",
        }
        await endpoint.app(scope, receive, send)
        while not ended:
            await asyncio.sleep(0)
        return sent

    sent = at(home, router, leave)
    assert sent[0]["status"] == 499
    assert len(router.asked) == len(ended) == 1


def test_one_thread_is_enough_for_all(home: Path) -> None:
    response = at(home, FakeRouter(), lambda endpoint: endpoint.post({"batch": [ONE] * 5}), threads=1)
    assert [each["outputs"]["count"] for each in response.json()["results"]] == [3] * 5


def test_dspy_is_not_imported_before_a_program_is_asked_for() -> None:
    code = "import sys, serve.predict; sys.exit('dspy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_dspy_the_client_is_told_what_to_install(home: Path) -> None:
    code = """
import sys
sys.modules["dspy"] = None
from pathlib import Path
from tests.serve.predict_support import FakeRouter
from tests.serve.test_predict import ONE, at
response = at(Path(sys.argv[1]), FakeRouter(), lambda endpoint: endpoint.post(ONE))
print(response.status_code, response.json()["error"]["message"])
"""
    done = subprocess.run([sys.executable, "-c", code, home], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("501 ")
    assert "pip install 'homestill[predict]'" in done.stdout
