"""What must hold for any client in front of any model. A client that has no words for a feature is skipped
for it, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("gguf", reason="needs gguf, to write a model")

from tests.clients.backends import BACKENDS, CALLS, JSON_TEXT, RETRY_AFTER, TEXT, Backend
from tests.clients.clients import CLIENTS, Answer, Client, Failure, joined

pytestmark = [  # what the packages warn of is their own
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
NESTED = {
    "type": "object",
    "properties": {
        "at": {"$ref": "#/$defs/point"},
        "names": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
    },
    "required": ["at"],
    "$defs": {"point": POINT},
}
FLAT = {"type": "object", "properties": {"at": {"type": "object"}}, "required": ["at"]}
OTHER = {"type": "function", "function": {"name": "sum", "description": "Sum up.", "parameters": FLAT}}


def tools(schema: dict[str, Any]) -> list[dict[str, Any]]:
    look = {"name": "look", "description": "Look there.", "parameters": schema}
    return [{"type": "function", "function": look}, OTHER]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with BACKENDS[request.param](tmp_path_factory.mktemp("home")) as running:
        yield running


HEAVY = ("litellm", "dspy")
"""They take seconds to import."""
KINDS = [
    pytest.param(kind, id=kind.name, marks=[pytest.mark.slow] if kind.name in HEAVY else [])
    for kind in CLIENTS
]


@pytest.fixture(scope="module", params=KINDS)
def client(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Client]:
    pytest.importorskip(request.param.name, reason="a client")
    opened = request.param(backend.url)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def forgotten(backend: Backend) -> None:
    """A test sees only what it asked itself."""
    for model in {id(model): model for model in (backend.teacher, backend.capable)}.values():
        for event in (model.began, model.go_on, model.hung_up):
            event.clear()
        model.asked.clear()


def needs(client: Client, *features: str) -> None:
    for feature in features:
        if feature in client.cannot:
            pytest.skip(f"{client.name}: {client.cannot[feature]}")


def ask(backend: Backend, client: Client, messages: list[dict[str, Any]] = HELLO, **features: Any) -> Answer:
    return client.ask(backend.model, messages, **{"temperature": 0, "max_tokens": 12, **features})


def calls_tools(backend: Backend) -> None:
    if backend.double:
        pytest.skip("ollama: its double calls no tools")


def stream(
    backend: Backend, client: Client, messages: list[dict[str, Any]] = HELLO, **features: Any
) -> list[Answer]:
    needs(client, "stream")
    return list(client.pieces(backend.model, messages, **{"temperature": 0, "max_tokens": 12, **features}))


def test_chat(backend: Backend, client: Client) -> None:
    answer = ask(backend, client)
    assert answer.text == TEXT or backend.name == "embedded"
    assert answer.text
    assert answer.counts is not None
    assert min(answer.counts) > 0
    assert (answer.calls, answer.tokens) == ([], [])
    assert answer.finish in ("stop", "length") or "finish" in client.cannot
    assert answer.homestill is None or answer.homestill["route"] == backend.answers
    assert bool(backend.teacher.asked) == (backend.answers == "teacher")


def test_content_parts_and_a_system_message(backend: Backend, client: Client) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    if client.name == "ollama":
        pytest.skip("ollama: its messages are texts")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": parts},
    ]
    assert ask(backend, client, messages).text
    assert bool(backend.teacher.asked) == (backend.answers == "teacher")


def test_a_stream_says_what_the_whole_answer_says(backend: Backend, client: Client) -> None:
    pieces = stream(backend, client)
    told = joined(pieces)
    whole = ask(backend, client)
    assert (told.text, told.finish) == (whole.text, whole.finish)
    assert told.counts == whole.counts
    assert told.homestill is None or told.homestill["route"] == backend.answers
    if backend.answers == "teacher":
        assert len([piece for piece in pieces if piece.text]) > 1


def test_nested_schemas_arrive_untouched(backend: Backend, client: Client) -> None:
    calls_tools(backend)
    needs(client, "nested")
    ask(backend, client, tools=tools(NESTED))
    assert backend.capable.asked[0]["tools"] == tools(NESTED)


def test_parallel_tool_calls(backend: Backend, client: Client) -> None:
    """A local runtime that cannot call tools hands over: the client sees calls all the same."""
    calls_tools(backend)
    answer = ask(backend, client, tools=tools(FLAT))
    assert answer.calls == CALLS
    assert None in answer.ids or len(set(answer.ids)) == 3
    assert answer.finish in ("tool_calls", "stop") or "finish" in client.cannot
    assert len(backend.capable.asked) == 1


def test_tool_calls_in_a_stream(backend: Backend, client: Client) -> None:
    calls_tools(backend)
    told = joined(stream(backend, client, tools=tools(FLAT)))
    assert told.calls == CALLS
    assert told.text == ""
    assert told.counts is not None


def test_tool_results_go_back_to_their_calls(backend: Backend, client: Client) -> None:
    calls_tools(backend)
    first = ask(backend, client, tools=tools(FLAT))
    ids = [identity or f"own_{at}" for at, identity in enumerate(first.ids)]
    calls = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for identity, (name, arguments) in zip(ids, first.calls, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": identity, "content": f"result {at}"}
        for at, identity in enumerate(ids)
    ]
    messages: list[dict[str, Any]] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results,
    ]
    answer = ask(backend, client, messages, tools=tools(FLAT), max_tokens=64)
    sent = [call["id"] for call in backend.capable.asked[-1]["messages"][1]["tool_calls"]]
    assert json.loads(answer.text) == {identity: f"result {at}" for at, identity in enumerate(sent)}
    assert sent == ids or None in first.ids


def test_a_tool_is_chosen(backend: Backend, client: Client) -> None:
    calls_tools(backend)
    needs(client, "tool_choice")
    choice = {"type": "function", "function": {"name": "sum"}}
    answer = ask(backend, client, tools=tools(FLAT), tool_choice=choice)
    assert [name for name, _ in answer.calls] == ["sum"]
    none = ask(backend, client, tools=tools(FLAT), tool_choice="none")
    assert (none.calls, bool(none.text)) == ([], True)


def test_an_answer_follows_a_schema(backend: Backend, client: Client) -> None:
    messages = [{"role": "user", "content": "Is it well? Answer as JSON."}]
    answer = ask(backend, client, messages, response_format=FORM, max_tokens=60)
    assert isinstance(json.loads(answer.text)["ok"], bool)
    if backend.double:
        assert backend.double.log[-1]["body"]["response_format"]["json_schema"]["schema"] == SCHEMA
    elif backend.name != "embedded":
        assert backend.capable.asked[-1]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_any_json(backend: Backend, client: Client) -> None:
    if backend.name == "embedded":
        pytest.skip("embedded: random weights end no JSON that may be anything")
    messages = [{"role": "user", "content": "Is it well? Answer as JSON."}]
    answer = ask(backend, client, messages, response_format={"type": "json_object"})
    assert answer.text == JSON_TEXT


def test_logprobs(backend: Backend, client: Client) -> None:
    answer = ask(backend, client, logprobs=True, top_logprobs=1)
    assert answer.tokens
    assert all(logprob <= 0 for _, logprob, _ in answer.tokens)
    assert {alternatives for _, _, alternatives in answer.tokens} == {1}
    if backend.name != "embedded":  # whose tokens may be parts of a character
        assert "".join(token for token, _, _ in answer.tokens) == answer.text
    bare = ask(backend, client, logprobs=True)
    assert {alternatives for _, _, alternatives in bare.tokens} == {0}


def test_logprobs_in_a_stream(backend: Backend, client: Client) -> None:
    told = joined(stream(backend, client, logprobs=True, top_logprobs=1))
    whole = ask(backend, client, logprobs=True, top_logprobs=1)
    assert [token for token, _, _ in told.tokens] == [token for token, _, _ in whole.tokens]


def test_several_answers(backend: Backend, client: Client) -> None:
    needs(client, "n")
    answer = ask(backend, client, n=3, temperature=1, seed=5)
    assert len(answer.texts) == 3
    assert all(answer.texts)
    assert bool(backend.teacher.asked) == (backend.answers == "teacher")
    if backend.name == "embedded" and client.name != "dspy":  # which asks three times with one seed
        assert len(set(answer.texts)) > 1


@pytest.mark.parametrize("several", [False, True])
def test_stop(backend: Backend, client: Client, several: bool) -> None:
    text = ask(backend, client).text
    stop = text[len(text) // 2]
    before = text.partition(stop)[0]
    cut = ask(backend, client, stop=["\u2603", stop] if several else stop)
    assert cut.text == before
    assert cut.finish == "stop" or "finish" in client.cannot


def test_a_seed_repeats_the_draw(backend: Backend, client: Client) -> None:
    one, again = (ask(backend, client, temperature=1.0, seed=11).text for _ in range(2))
    assert one == again
    if backend.double:
        options = backend.double.log[-1]["options"]
        assert (options["seed"], options["temperature"]) == (11, 1)


def test_without_a_seed_every_draw_is_another(backend: Backend, client: Client) -> None:
    if backend.name != "embedded":
        pytest.skip(f"{backend.name}: it draws nothing")
    ask(backend, client, temperature=1.0, seed=11)
    assert len({ask(backend, client, temperature=1.0).text for _ in range(4)}) > 1


def test_the_longest_answer(backend: Backend, client: Client) -> None:
    answer = ask(backend, client, max_tokens=2)
    if backend.name in ("embedded", "ollama"):
        assert answer.counts is not None
        assert answer.counts[1] == 2
        assert answer.finish == "length" or "finish" in client.cannot
    else:
        assert 2 in (backend.capable.asked[0].get(name) for name in ("max_tokens", "max_completion_tokens"))


def failed(backend: Backend, client: Client, model: str | None = None, **features: Any) -> Failure:
    with pytest.raises(Exception) as caught:  # each package has its own
        client.ask(model or backend.model, HELLO, **features)
    return client.failure(caught.value)


def test_a_wrong_key_is_told(backend: Backend, client: Client) -> None:
    stranger = client.with_key("sk-wrong")
    failure = failed(backend, stranger)
    stranger.close()
    assert failure.status == 401
    assert "key" in failure.text


@pytest.mark.parametrize(("model", "status"), [("nobody", 404), ("picky", 400)])
def test_an_upstreams_no_is_passed_on(backend: Backend, client: Client, model: str, status: int) -> None:
    failure = failed(backend, client, model)
    assert failure.status == status
    assert f"it says {status}" in failure.text


def test_a_fault_in_the_request_is_named(backend: Backend, client: Client) -> None:
    failure = failed(backend, client, temperature=7.5)
    assert failure.status == 400
    assert "temperature is 7.5" in failure.text
    assert backend.teacher.asked == []


def test_a_rate_limit_is_passed_on_with_its_wait(backend: Backend, client: Client) -> None:
    failure = failed(backend, client, "limited")
    assert failure.status == 429
    if client.name in ("openai", "litellm"):
        assert failure.retry_after == RETRY_AFTER


def test_leaving_a_stream_ends_the_work_upstream(backend: Backend, client: Client) -> None:
    needs(client, "stream")
    with closing(client.pieces("slow", HELLO)) as pieces:  # type: ignore[type-var]
        assert any(piece.text == "Well" for piece in islice(pieces, 2))
        assert backend.teacher.began.wait(10)
    assert backend.teacher.hung_up.wait(10)
