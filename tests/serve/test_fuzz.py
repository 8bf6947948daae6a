"""Whatever the OpenAPI document allows, and what it does not, gets an answer or a clear refusal: never a 5xx of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from serve.config import Config, TaskRules
from serve.settings import Settings
from tests.serve.endpoint_support import Hybrid, hybrid, local_model, question, teacher_model
from tests.serve.release_support import write_release

MANY = int(os.environ.get("HOMESTILL_FUZZ", "120"))
"""Requests for each operation of the document; 10,000 in all and more with HOMESTILL_FUZZ=1700."""
OURS = frozenset({500, 501, 502, 504})
"""No request may bring these about: both models are well, and 503 is for when they are not."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hybrid]:
    home = tmp_path_factory.mktemp("home")
    write_release(home / "releases")
    rules = Settings(home, config=Config(defaults=TaskRules(audit=0)))
    with hybrid(home, local_model(), teacher_model(), rules) as found:
        yield found


def sent(served: Hybrid, case: Any) -> httpx.Response:
    kwargs = case.as_transport_kwargs(base_url=served.url)
    kwargs.pop("cookies", None)
    try:
        request = served.client.build_request(
            kwargs["method"],
            kwargs["url"],
            params=kwargs.get("params"),
            headers={str(key): str(value) for key, value in (kwargs.get("headers") or {}).items()},
            content=json.dumps(kwargs["json"]).encode() if "json" in kwargs else kwargs.get("data") or b"",
        )
    except (ValueError, TypeError, httpx.InvalidURL):  # no client could send this
        return httpx.Response(400)
    return served.client.send(request)


@pytest.mark.slow
@pytest.mark.timeout(max(900, 2 * MANY))
def test_no_request_brings_the_server_down(served: Hybrid) -> None:
    document = served.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    seen: dict[int, int] = {}
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # an operation that cannot be read fails here

        @settings(
            max_examples=MANY,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = sent(served, case)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code not in OURS, (
                case.method,
                case.formatted_path,
                case.body,
                response.text,
            )

        ask()
    assert seen.get(200), seen
    assert sum(seen.values()) >= 6 * MANY, seen  # an operation without parameters has only one request
    assert served.client.get("/healthz").json()["status"] == "ok"


@settings(max_examples=MANY)
@given(
    data=st.binary(max_size=300),
    path=st.sampled_from(["/v1/chat/completions", "/api/chat", "/v1/completions"]),
)
def test_bytes_that_mean_nothing_are_refused(served: Hybrid, data: bytes, path: str) -> None:
    assert served.client.post(path, content=data).status_code in (400, 404)


def test_nothing_of_it_stays_in_memory(served: Hybrid) -> None:
    """Of many alike requests the later ones cost no memory that the earlier ones did not."""

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def many() -> int:
        for number in range(400):
            assert served.ask(question(f"My invoice {number} is wrong")).status_code == 200
            assert served.ask({"model": f"m{number}", "messages": [{"role": "user"}]}).status_code == 400
        return resident()

    many()
    first = many()
    assert many() - first < 4096, "more than 4 MB for 400 answered and 400 refused requests"
