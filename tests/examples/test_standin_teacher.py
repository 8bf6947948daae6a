"""The stand-in teacher, as a process of its own on a free port."""

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

dspy = pytest.importorskip("dspy")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/standin_teacher.py"
ROWS: list[dict[str, Any]] = [
    {"text": f"row {i} about {word}", "label": word, "things": [f"T{i}"]}
    for i, word in enumerate(["cats", "dogs", "fish"] * 100)
]


LABELS = Literal["cats", "dogs", "fish"]
FIELDS = {
    "text": (str, dspy.InputField()),
    "label": (LABELS, dspy.OutputField()),
    "things": (list[str], dspy.OutputField()),
}
Sort = dspy.make_signature(FIELDS, "Sort the text.", signature_name="Sort")


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The address of a running server."""
    answers = folder / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [
        sys.executable,
        str(SCRIPT),
        "--answers",
        str(answers),
        "--port",
        "0",
        "--latency-ms",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "the server did not start"
        yield process.stdout.readline().decode().split(" ")[2].removesuffix("/v1")
    finally:
        process.terminate()
        process.communicate(timeout=20)


def ask(address: str, text: str, **more: Any) -> Any:
    """The open response to a prompt by DSPy's adapter."""
    messages = dspy.ChatAdapter().format(Sort, [], {"text": text})
    body = {"model": "standin-teacher", "messages": messages, **more}
    return urlopen(Request(address + "/v1/chat/completions", json.dumps(body).encode()), timeout=20)


def content(address: str, text: str) -> dict[str, Any]:
    """The parsed fields of an answer."""
    body = json.load(ask(address, text))
    assert body["usage"]["prompt_tokens"] > 50 < body["usage"]["total_tokens"]
    fields: dict[str, Any] = dspy.ChatAdapter().parse(Sort, body["choices"][0]["message"]["content"])
    return fields


def counts(address: str) -> dict[str, int]:
    found: dict[str, int] = json.load(urlopen(address + "/counts", timeout=20))
    return found


def test_answers_as_dspy_reads_them_and_counts(tmp_path: Path) -> None:
    with serving(tmp_path, "--mistakes", "0") as address:
        for row in ROWS[:5]:
            assert content(address, row["text"]) == {"label": row["label"], "things": row["things"]}
        assert content(address, "unknown: dogs, row 1")["label"] == "dogs"
        assert counts(address) == {
            "requests": 6,
            "failed": 0,
            "distinct_prompts": 6,
            "max_per_prompt": 1,
            "repeated_prompts": 0,
        }
        content(address, ROWS[0]["text"])
        assert counts(address)["max_per_prompt"] == 2
        assert counts(address)["repeated_prompts"] == 1
        with urlopen(address + "/v1/models", timeout=20) as response:
            assert response.headers["x-stand-in"] == "true"
            assert json.load(response)["data"][0]["id"] == "standin-teacher"


def test_mistakes_are_rare_allowed_and_always_the_same(tmp_path: Path) -> None:
    with serving(tmp_path, "--mistakes", "0.1") as address:
        first = [content(address, row["text"])["label"] for row in ROWS]
        again = [content(address, row["text"])["label"] for row in ROWS[:20]]
    wrong = sum(label != row["label"] for label, row in zip(first, ROWS, strict=True))
    assert 15 <= wrong <= 45
    assert set(first) == {"cats", "dogs", "fish"}
    assert again == first[:20]


def test_stream_says_the_same(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        whole = json.load(ask(address, ROWS[1]["text"]))["choices"][0]["message"]["content"]
        raw = (
            ask(address, ROWS[1]["text"], stream=True, stream_options={"include_usage": True}).read().decode()
        )
    lines = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == whole
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_fails_when_asked_to(tmp_path: Path) -> None:
    with serving(tmp_path, "--fail-every", "2", "--fail-status", "429") as address:
        content(address, ROWS[0]["text"])
        with pytest.raises(HTTPError) as caught:
            content(address, ROWS[1]["text"])
        caught.value.close()
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (429, "0")
        assert counts(address)["failed"] == 1


def test_bad_requests_get_a_remedy(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        for body, status in ((b"{", 400), (b'{"messages": []}', 400), (b"[]", 400)):
            with pytest.raises(HTTPError) as caught:
                urlopen(Request(address + "/v1/chat/completions", body), timeout=20)
            assert caught.value.code == status
            assert "error" in json.load(caught.value)


def test_importing_it_does_nothing() -> None:
    spec = importlib.util.spec_from_file_location("standin_teacher", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MODEL == "standin-teacher"
