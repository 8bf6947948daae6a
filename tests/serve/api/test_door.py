"""What never reaches the router: no key, a bad body, an unknown path."""

from __future__ import annotations

from pathlib import Path

from serve.config import Config, Limits
from serve.settings import Settings
from tests.serve.endpoint_support import (
    hybrid,
    local_model,
    question,
    teacher_model,
)
from tests.serve.release_support import write_release

BAD = [
    b"{",
    b"[]",
    b'{"messages": [{"role": "user"}]}',
    b'{"model": "", "messages": [{"role": "user"}]}',
    b'{"model": "\\ud800", "messages": [{"role": "user"}]}',
    b'{"model": "m"}',
    b'{"model": "m", "messages": []}',
    b'{"model": "m", "messages": [1]}',
    b'{"model": "m", "messages": [{"content": "x"}]}',
    b'{"model": "m", "messages": [{"role": "user"}], "stream": "yes"}',
    b'{"model": "m", "messages": [{"role": "user"}], "max_tokens": "9"}',
    b"[" * 100_000,
]


class TestDoor:
    def test_keys(self, tmp_path: Path) -> None:
        settings = Settings(tmp_path, api_keys=("first-key", "second-key"))
        with hybrid(tmp_path, None, teacher_model(), settings) as served:
            assert served.ask(question(), Authorization="Bearer second-key").status_code == 200
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
                response = served.ask(question(), **headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert served.client.get("/v1/models").status_code == 401
            assert served.client.get("/healthz").status_code == 200

    def test_bad_requests(self, tmp_path: Path) -> None:
        teacher = teacher_model()
        with hybrid(tmp_path, None, teacher) as served:
            for data in BAD:
                response = served.client.post("/v1/chat/completions", content=data)
                error = response.json()["error"]
                assert (response.status_code, error["type"]) == (400, "invalid_request_error"), data
                assert error.keys() == {"message", "type", "param", "code"}
        assert teacher.asked == []

    def test_a_request_that_is_too_long(self, tmp_path: Path) -> None:
        with hybrid(
            tmp_path, None, teacher_model(), Settings(tmp_path, config=Config(limits=Limits(body_bytes=1024)))
        ) as served:
            response = served.ask(question("x" * 2000))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def test_unknown_paths_and_methods(self, tmp_path: Path) -> None:
        with hybrid(tmp_path, None, None) as served:
            for response in (served.client.get("/nothing"), served.client.get("/v1/chat/completions")):
                assert response.status_code in (404, 405)
                assert response.json()["error"]["type"] == "invalid_request_error"

    def test_models_are_the_tasks_with_a_release(self, tmp_path: Path) -> None:
        version = write_release(tmp_path / "releases")
        with hybrid(tmp_path, local_model(), None) as served:
            listed = served.client.get("/v1/models").json()["data"]
            one = served.client.get("/v1/models/tickets").json()
            other = served.client.get("/v1/models/cats")
        assert [model["id"] for model in listed] == ["tickets"]
        assert one == listed[0]
        assert one["homestill"]["release"] == version
        assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
