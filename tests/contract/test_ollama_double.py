"""The double against the notes on how Ollama behaves."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract import files
from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Canned

GO = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}<assistant>"
TALK = [{"role": "user", "content": "Hello"}]
ZEROS = "0" * 64


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OllamaDouble]:
    with OllamaDouble(tmp_path / "blobs") as running:
        yield running


@pytest.fixture
def http(double: OllamaDouble) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=double.url, timeout=10.0) as client:
        yield client


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return files.shell(tmp_path / "model.gguf")


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def upload(http: httpx.Client, path: Path) -> str:
    digest = sha256(path)
    assert http.post(f"/api/blobs/{digest}", content=path.read_bytes()).status_code in (200, 201)
    return digest


def create(http: httpx.Client, path: Path, name: str = "m", **more: Any) -> httpx.Response:
    body = {"model": name, "files": {"m.gguf": upload(http, path)}, "stream": False, **more}
    return http.post("/api/create", json=body)


def error(response: httpx.Response) -> str:
    return str(response.json()["error"])


def test_it_names_itself_a_double(http: httpx.Client) -> None:
    answer = http.get("/api/version")
    assert answer.json() == {"version": "0.33.0-double"}
    assert answer.headers["x-ollama-double"] == "1"
    assert http.get("/").text == "Ollama is running"


class TestBlobs:
    def test_head_and_post(self, http: httpx.Client, gguf: Path) -> None:
        path = f"/api/blobs/{sha256(gguf)}"
        assert http.head(path).status_code == 404
        first = http.post(path, content=gguf.read_bytes())
        assert (first.status_code, first.content) == (201, b"")
        assert http.head(path).status_code == 200
        assert http.post(path, content=b"x").status_code == 200, "the body of a known blob is not read"

    def test_chunked_upload(self, http: httpx.Client, gguf: Path) -> None:
        pieces = iter([gguf.read_bytes()[:1000], gguf.read_bytes()[1000:]])
        assert http.post(f"/api/blobs/{sha256(gguf)}", content=pieces).status_code == 201

    def test_put_and_get_are_not_there(self, http: httpx.Client) -> None:
        assert http.put(f"/api/blobs/sha256:{ZEROS}").status_code == 405
        assert http.get(f"/api/blobs/sha256:{ZEROS}").status_code == 405

    @pytest.mark.parametrize("digest", ["sha256:12", f"md5:{ZEROS}", "x"])
    def test_bad_form(self, http: httpx.Client, digest: str) -> None:
        answer = http.post(f"/api/blobs/{digest}", content=b"x")
        assert (answer.status_code, error(answer)) == (400, "invalid digest format")
        assert http.head(f"/api/blobs/{digest}").status_code == 400

    def test_a_mismatch_keeps_the_bytes_under_their_true_digest(self, http: httpx.Client, gguf: Path) -> None:
        answer = http.post(f"/api/blobs/sha256:{ZEROS}", content=gguf.read_bytes())
        assert answer.status_code == 400
        assert error(answer).startswith(f'digest mismatch, expected "sha256:{ZEROS}", got "{sha256(gguf)}"')
        assert http.head(f"/api/blobs/sha256:{ZEROS}").status_code == 404
        assert http.head(f"/api/blobs/{sha256(gguf)}").status_code == 200

    @pytest.mark.parametrize("change", [str.upper, lambda text: text.replace(":", "-")])
    def test_other_spellings_end_as_mismatch(self, http: httpx.Client, gguf: Path, change: Any) -> None:
        spelled = "sha256" + change(sha256(gguf).removeprefix("sha256"))
        answer = http.post(f"/api/blobs/{spelled}", content=gguf.read_bytes())
        assert answer.status_code == 400
        assert "digest mismatch" in error(answer)

    def test_a_short_body_leaves_nothing(self, double: OllamaDouble, gguf: Path) -> None:
        host, port = double.server.server_address[:2]
        with socket.create_connection((str(host), int(port))) as raw:
            raw.sendall(
                f"POST /api/blobs/{sha256(gguf)} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc".encode()
            )
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb").read()
        assert b" 500 " in answer
        assert b"unexpected EOF" in answer
        assert list(double.blobs.folder.iterdir()) == []


class TestCreate:
    def test_statuses_of_a_stream(self, http: httpx.Client, gguf: Path) -> None:
        with http.stream(
            "POST", "/api/create", json={"model": "m", "files": {"m.gguf": upload(http, gguf)}}
        ) as got:
            lines = [json.loads(line) for line in got.iter_lines()]
        assert lines[0] == {"status": "parsing GGUF"}
        assert lines[-1] == {"status": "success"}

    def test_an_error_of_a_stream_is_a_line_under_200(
        self, double: OllamaDouble, http: httpx.Client, gguf: Path
    ) -> None:
        double.faults.set({"create_error": 1})
        body = {"model": "m", "files": {"m.gguf": upload(http, gguf)}}
        answer = http.post("/api/create", json=body)
        assert answer.status_code == 200
        assert "llama-quantize failed" in json.loads(answer.text.splitlines()[-1])["error"]
        assert http.post("/api/show", json={"model": "m"}).status_code == 404

    def test_a_stream_that_is_left_creates_nothing(
        self, double: OllamaDouble, http: httpx.Client, gguf: Path
    ) -> None:
        body = json.dumps({"model": "m", "files": {"m.gguf": upload(http, gguf)}})
        host, port = double.server.server_address[:2]
        with socket.create_connection((str(host), int(port))) as raw:
            raw.sendall(
                f"POST /api/create HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            raw.send(body.encode(), socket.MSG_MORE)  # held back, so that it arrives together with the end
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb")
            with pytest.raises(ConnectionResetError):
                answer.read()
        assert double.models.all() == []

    @pytest.mark.parametrize(
        ("body", "status", "text"),
        [
            ({"model": "-bad", "files": {}}, 400, "invalid model name"),
            ({"model": "a/b/c/d", "files": {}}, 400, "invalid model name"),
            ({"model": "m@sha256:1", "files": {}}, 400, "invalid model name"),
            ({"model": "m:" + "t" * 81, "files": {}}, 400, "invalid model name"),
            ({"model": "m"}, 400, "neither 'from' or 'files' was specified"),
            ({"model": "m", "modelfile": "FROM x"}, 400, "neither 'from' or 'files' was specified"),
            ({"model": "m", "files": {}}, 400, "unknown type"),
            ({"model": "m", "files": {"m.txt": f"sha256:{ZEROS}"}}, 400, "unknown type"),
            ({"model": "m", "files": {"/m.gguf": f"sha256:{ZEROS}"}}, 400, "file path must be relative"),
            ({"model": "m", "files": {"../m.gguf": f"sha256:{ZEROS}"}}, 400, "file path must be relative"),
            ({"model": "m", "files": {"m.gguf": "sha256:12"}}, 500, "invalid digest format"),
            ({"model": "m", "files": {"m.gguf": f"sha256:{ZEROS}"}}, 500, "no such file or directory"),
            ({"model": "m", "from": "stranger"}, 500, "pull model manifest"),
        ],
    )
    def test_refusals(self, http: httpx.Client, body: dict[str, Any], status: int, text: str) -> None:
        answer = http.post("/api/create", json={**body, "stream": False})
        assert answer.status_code == status
        assert text in error(answer)

    def test_bad_json(self, http: httpx.Client) -> None:
        assert http.post("/api/create", content=b"{").status_code == 400
        assert http.post("/api/create").status_code == 400

    def test_what_is_no_gguf_or_cut_short(self, http: httpx.Client, gguf: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.gguf"
        other.write_bytes(b"something else")
        answer = create(http, other)
        assert (answer.status_code, error(answer)) == (400, "supplied file was not in GGUF format")
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(gguf.read_bytes()[:-1000])
        answer = create(http, cut)
        assert answer.status_code == 500
        assert "exceeds file size" in error(answer)

    def test_a_bad_template(self, http: httpx.Client, gguf: Path) -> None:
        answer = create(http, gguf, template="{{ range .Messages }}")
        assert answer.status_code == 400
        assert "template error" in error(answer)

    def test_the_layer_of_a_converted_file_has_another_digest(
        self, http: httpx.Client, tmp_path: Path
    ) -> None:
        for kind, same in ((files.F16, False), (files.Q8_0, True)):
            path = files.shell(tmp_path / f"{kind}.gguf", file_type=kind)
            create(http, path)
            shown = http.post("/api/show", json={"model": "m"}).json()["modelfile"]
            assert (sha256(path).removeprefix("sha256:") in shown) is same

    def test_an_existing_name_is_replaced_without_regard_to_case(
        self, http: httpx.Client, gguf: Path
    ) -> None:
        create(http, gguf, "foo", template="{{ .Prompt }} one")
        assert create(http, gguf, "Foo", template="{{ .Prompt }} two").json() == {"status": "success"}
        assert [model["name"] for model in http.get("/api/tags").json()["models"]] == ["foo:latest"]
        assert http.post("/api/show", json={"model": "foo"}).json()["template"] == "{{ .Prompt }} two"

    def test_a_short_template_is_taken_for_chatml(self, http: httpx.Client, tmp_path: Path) -> None:
        short = files.shell(
            tmp_path / "short.gguf", jinja="{% for m in messages %}{{ m.content }}{% endfor %}"
        )
        long = files.shell(
            tmp_path / "long.gguf", jinja="{#- " + "x" * 500 + " -#}{{ messages[0].content }}!", seed=1
        )
        create(http, short, "short")
        create(http, long, "long")
        create(http, short, "given", template=GO)
        assert "<|im_start|>" in rendered(http, "short")
        assert rendered(http, "long") == "Hello!"
        assert rendered(http, "given") == "<user>Hello<assistant>"

    def test_from_inherits(self, http: httpx.Client, gguf: Path) -> None:
        create(http, gguf, "m", template=GO, parameters={"temperature": 0.5})
        body = {
            "model": "n",
            "from": "m",
            "files": {"x": "ignored"},
            "parameters": {"seed": 1},
            "stream": False,
        }
        assert http.post("/api/create", json=body).status_code == 200
        shown = http.post("/api/show", json={"model": "n"}).json()
        assert shown["template"] == GO
        assert "temperature" in shown["parameters"]
        assert "seed" in shown["parameters"]


def rendered(http: httpx.Client, model: str) -> str:
    body = {"model": model, "messages": TALK, "_debug_render_only": True}
    return str(http.post("/api/chat", json=body).json()["_debug_info"]["rendered_template"])


class TestInference:
    def chat(self, http: httpx.Client, **more: Any) -> httpx.Response:
        return http.post("/api/chat", json={"model": "m", "messages": TALK, "stream": False, **more})

    def complete(self, http: httpx.Client, **more: Any) -> httpx.Response:
        return http.post("/v1/chat/completions", json={"model": "m", "messages": TALK, **more})

    def test_both_shapes(self, http: httpx.Client, gguf: Path) -> None:
        create(http, gguf, template=GO)
        native = self.chat(http, logprobs=True, top_logprobs=1).json()
        assert native["message"]["content"] == "A canned answer."
        assert (native["done"], native["done_reason"]) == (True, "stop")
        assert native["logprobs"][0]["top_logprobs"][0]["token"] == "A"
        choice = self.complete(http, logprobs=True).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert "".join(token["token"] for token in choice["logprobs"]["content"]) == "A canned answer."
        assert "logprobs" not in self.complete(http, top_logprobs=3).json()["choices"][0]
        assert self.chat(http, logprobs=True, top_logprobs=21).status_code == 400

    def test_v1_forces_temperature_and_ignores_what_it_does_not_know(
        self, double: OllamaDouble, http: httpx.Client, gguf: Path
    ) -> None:
        create(http, gguf, template=GO, parameters={"temperature": 0.0, "num_ctx": 512})
        self.complete(http)
        self.complete(
            http, temperature=0.0, max_tokens=2, max_completion_tokens=9, options={"num_ctx": 1}, keep_alive=0
        )
        self.chat(http)
        asked = [call["options"] for call in cast_canned(double).asked]
        assert [options["temperature"] for options in asked] == [1.0, 0.0, 0.0]
        assert asked[1]["num_predict"] == 2
        assert asked[1]["num_ctx"] == 512
        assert len(http.get("/api/ps").json()["models"]) == 1

    @pytest.mark.parametrize(
        ("parameters", "fault"),
        [
            ({"temperature": "0.1"}, 'option "temperature" must be of type float32'),
            ({"stop": "</s>"}, 'option "stop" must be of type array'),
        ],
    )
    def test_wrong_parameters_break_every_answer(
        self, http: httpx.Client, gguf: Path, parameters: Any, fault: str
    ) -> None:
        assert create(http, gguf, template=GO, parameters=parameters).status_code == 200
        assert (self.chat(http).status_code, error(self.chat(http))) == (500, fault)
        if "stop" in parameters:  # /v1 itself sets the temperature
            assert self.complete(http).json()["error"]["type"] == "api_error"

    def test_unknown_options_are_kept_and_ignored(self, http: httpx.Client, gguf: Path) -> None:
        create(http, gguf, template=GO, parameters={"frobnicate": "x"})
        assert self.chat(http).status_code == 200

    def test_streams(self, http: httpx.Client, gguf: Path) -> None:
        create(http, gguf, template=GO)
        lines = [json.loads(line) for line in self.chat(http, stream=True).text.splitlines()]
        assert "".join(line["message"]["content"] for line in lines) == "A canned answer."
        assert lines[-1]["done"] is True
        events = self.complete(http, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 3

    def test_a_token_repeated_too_often_aborts(self, tmp_path: Path, gguf: Path) -> None:
        engine = Canned(lambda prompt: " no" * 31)
        with OllamaDouble(tmp_path / "b", engine) as double, httpx.Client(base_url=double.url) as http:
            create(http, gguf, template=GO)
            native = self.chat(http).json()
            assert (native["done"], "done_reason" in native) == (False, False)
            answer = self.complete(http).json()
            assert (answer["choices"][0]["finish_reason"], answer["usage"]["total_tokens"]) == (None, 0)
            assert "[DONE]" not in self.complete(http, stream=True).text

    def test_keep_alive_and_loading(self, http: httpx.Client, gguf: Path) -> None:
        create(http, gguf, template=GO)
        assert self.chat(http, messages=[]).json()["done_reason"] == "load"
        assert len(http.get("/api/ps").json()["models"]) == 1
        assert self.chat(http, messages=[], keep_alive=0).json()["done_reason"] == "unload"
        assert http.get("/api/ps").json()["models"] == []
        assert self.chat(http, keep_alive="soon").status_code == 400

    def test_unknown_models_and_traps(self, http: httpx.Client, gguf: Path) -> None:
        missing = self.chat(http)
        assert (missing.status_code, error(missing)) == (404, "model 'm:latest' not found")
        for tag, status in (("cloud", 403), ("my-cloud", 403), ("local", 404)):
            assert create(http, gguf, f"m:{tag}", template=GO).status_code == 200
            assert self.chat(http, model=f"m:{tag}").status_code == status
        assert http.get("/api/nothing").status_code == 404
        assert http.get("/api/chat").status_code == 405
        assert self.complete(http, model="x").json()["error"]["type"] == "not_found_error"


def cast_canned(double: OllamaDouble) -> Canned:
    assert isinstance(double.engine, Canned)
    return double.engine


def test_delete_and_copy(http: httpx.Client, gguf: Path) -> None:
    create(http, gguf, "a", template=GO)
    assert http.post("/api/copy", json={"source": "a", "destination": "b:1"}).status_code == 200
    assert http.post("/api/copy", json={"source": "x", "destination": "b:1"}).status_code == 404
    assert http.request("DELETE", "/api/delete", json={"model": "a"}).status_code == 200
    assert http.request("DELETE", "/api/delete", json={"model": "a"}).status_code == 404
    assert rendered(http, "b:1") == "<user>Hello<assistant>"
    assert http.post("/api/show", json={}).status_code == 400


class TestFaults:
    def test_unknown_ones_are_refused(self, http: httpx.Client) -> None:
        assert http.post("/_double/faults", json={"gremlins": 1}).status_code == 400

    @pytest.mark.parametrize("fault", ["cut_upload", "restart_upload"])
    def test_uploads_that_die(self, http: httpx.Client, double: OllamaDouble, gguf: Path, fault: str) -> None:
        http.post("/_double/faults", json={fault: 1})
        with pytest.raises(httpx.TransportError):
            http.post(f"/api/blobs/{sha256(gguf)}", content=gguf.read_bytes())
        assert list(double.blobs.folder.iterdir()) == []
        if fault == "restart_upload":
            with pytest.raises(httpx.TransportError):
                http.get("/api/version")
        assert http.get("/api/version").status_code == 200

    def test_a_wrong_digest(self, http: httpx.Client, double: OllamaDouble, gguf: Path) -> None:
        double.faults.set({"wrong_digest": 1})
        answer = http.post(f"/api/blobs/{sha256(gguf)}", content=gguf.read_bytes())
        assert "digest mismatch" in error(answer)
        upload(http, gguf)

    def test_a_blob_that_vanishes(self, http: httpx.Client, double: OllamaDouble, gguf: Path) -> None:
        double.faults.set({"blob_vanishes": 1})
        assert "no such file" in error(create(http, gguf))
        assert create(http, gguf).status_code == 200

    def test_a_slow_create_is_finished_without_its_client(
        self, http: httpx.Client, double: OllamaDouble, gguf: Path
    ) -> None:
        digest = upload(http, gguf)
        double.faults.set({"slow_create": 1})
        body = {"model": "m", "files": {"m.gguf": digest}, "stream": False}
        with pytest.raises(httpx.ReadTimeout):
            http.post("/api/create", json=body, timeout=0.2)
        assert double.finished.wait(10)
        assert http.post("/api/show", json={"model": "m"}).status_code == 200

    def test_a_create_that_dies_with_the_server(
        self, http: httpx.Client, double: OllamaDouble, gguf: Path
    ) -> None:
        double.faults.set({"restart_create": 1})
        with pytest.raises(httpx.TransportError):
            create(http, gguf)
        with pytest.raises(httpx.TransportError):
            http.get("/api/tags")
        assert http.get("/api/tags").json() == {"models": []}

    def test_models_that_come_out_wrong(self, http: httpx.Client, double: OllamaDouble, gguf: Path) -> None:
        double.faults.set({"bad_parameters": 1})
        assert create(http, gguf, "a", template=GO).status_code == 200
        assert (
            http.post("/api/chat", json={"model": "a", "messages": TALK, "stream": False}).status_code == 500
        )
        double.faults.set({"misdetected_template": 1})
        assert create(http, gguf, "b", template=GO).status_code == 200
        assert "<|im_start|>" in rendered(http, "b")

    def test_inference_that_fails(self, http: httpx.Client, double: OllamaDouble, gguf: Path) -> None:
        create(http, gguf, template=GO)
        double.faults.set({"busy": 1, "token_repeat": 1})
        body = {"model": "m", "messages": TALK, "stream": False}
        assert http.post("/api/chat", json=body).status_code == 503
        assert http.post("/api/chat", json=body).json()["done"] is False
        assert http.post("/api/chat", json=body).json()["done"] is True


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [
        sys.executable,
        "-m",
        "tests.contract.ollama_double",
        "--port",
        "0",
        "--port-file",
        str(port_file),
    ]
    with subprocess.Popen(
        [*command, "--blobs", str(tmp_path / "blobs")], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            assert url.endswith(f":{port_file.read_text()}")
            assert httpx.get(f"{url}/api/version").json()["version"].endswith("-double")
            log = httpx.get(f"{url}/_double/log").json()["requests"]
            assert [entry["path"] for entry in log] == ["/api/version", "/_double/log"]
        finally:
            child.terminate()
