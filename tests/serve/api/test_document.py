"""The document says what the server does: what it allows is accepted, and it is a valid document."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from serve import predict
from serve.api import document as documents
from serve.api.checks import validated
from serve.api.completions import as_chat
from serve.api.document import PAGE_HEADERS, Documents, document, page
from serve.api.ollama_words import Ids, from_chat, from_generate
from serve.interface import Interface
from tests.serve.api.dialect_support import chat, client

INTERFACE = Interface(
    inputs={"text": {"type": "string", "description": "<script>alert(1)</script>"}},
    outputs={"tags": {"type": "array", "items": {"type": "string"}}, "why": {"type": "string"}},
    optional=["why"],
    predictors=["read"],
)
FOUND = document({"tickets": INTERFACE}, version="1.2.3", secured=True)
READERS: dict[str, Any] = {
    "/v1/chat/completions": validated,
    "/v1/completions": as_chat,
    "/api/chat": lambda body: from_chat(body, Ids()),
    "/api/generate": from_generate,
}


def resolved(value: Any) -> Any:
    """With each reference replaced; none of the requests' schemas holds itself."""
    if isinstance(value, list):
        return [resolved(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return resolved(FOUND["components"]["schemas"][value["$ref"].rpartition("/")[2]])
    return {key: resolved(each) for key, each in value.items()}


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    for schema in FOUND["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
    for path in FOUND["paths"].values():
        for operation in path.values():
            contents = [operation.get("requestBody", {"content": {}}), *operation["responses"].values()]
            for content in contents:
                for media in content["content"].values():
                    jsonschema_rs.meta.validate(resolved(media["schema"]))
    assert {operation["operationId"] for path in FOUND["paths"].values() for operation in path.values()}


def test_operations_are_told_apart() -> None:
    names = [operation["operationId"] for path in FOUND["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


def plain(value: Any) -> Any:
    """For a schema 1.0 is an integer; here it is none, and a client that writes one gets told."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("path", READERS)
def test_what_the_document_allows_is_accepted(path: str) -> None:
    operation = schemathesis.openapi.from_dict(FOUND)[path]["POST"]
    cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)

    @settings(max_examples=25, suppress_health_check=list(HealthCheck), database=None)
    @given(cases)
    def accepted(case: Any) -> None:
        READERS[path](plain(case.body))

    accepted()


def test_a_task_is_described_by_its_fields() -> None:
    one = FOUND["paths"]["/v1/predict/tickets"]["post"]
    request = one["requestBody"]["content"]["application/json"]["schema"]
    assert request["properties"] == INTERFACE.inputs
    answer = one["responses"]["200"]["content"]["application/json"]["schema"]["properties"]["outputs"]
    assert answer["required"] == ["tags"]
    many = FOUND["paths"]["/v1/predict/tickets/batch"]["post"]["requestBody"]["content"]["application/json"]
    assert many["schema"]["properties"]["batch"]["items"] == request


def test_the_bounds_are_those_of_predict() -> None:
    assert (documents.MOST_AT_ONCE, documents.LONGEST_BATCH) == (predict.MOST_AT_ONCE, predict.LONGEST_BATCH)


@pytest.mark.asyncio
async def test_tasks_are_shown_to_those_with_a_key(tmp_path: Path) -> None:
    door = chat(tmp_path, keys=("sk-good",)).door
    api = Documents(door, lambda: {"tickets": INTERFACE}, "1.2.3", secured=True)
    with client(api.routes()) as asking:
        stranger = (await asking.get("/openapi.json")).json()
        known = (await asking.get("/openapi.json", headers={"authorization": "Bearer sk-good"})).json()
    assert known == FOUND
    assert "/v1/predict/tickets" not in stranger["paths"]
    assert stranger["paths"].keys() < known["paths"].keys()


class Page(HTMLParser):
    """What a page loads and links, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "a":
            self.links.append(str(found["href"]))
        elif source := found.get("src") or found.get("href"):
            self.loaded.append(source)
        self.names.add(found.get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.asyncio
async def test_the_page_shows_it_all_and_runs_nothing_of_others(tmp_path: Path) -> None:
    read = Page()
    read.feed(page(FOUND))
    assert read.open == []
    assert all(path in read.words for path in FOUND["paths"])
    assert {link[1:] for link in read.links if link.startswith("#")} <= read.names
    assert all(source.startswith("/page/") for source in read.loaded)
    assert "<script>alert" not in page(FOUND)
    assert "script-src 'self'" in PAGE_HEADERS["content-security-policy"]
    api = Documents(chat(tmp_path).door, dict, "1.2.3", secured=False)
    with client(api.routes()) as asking:
        response = await asking.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "Authorization" not in response.text
