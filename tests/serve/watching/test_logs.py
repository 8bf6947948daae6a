"""The log: a line a request, without what was said."""

from __future__ import annotations

import io
import json
import logging

import pytest

from serve.watching.logs import AccessLog, LogFormat, configured
from tests.serve.watching.site_support import by_teacher, entry


def test_a_request_as_json() -> None:
    out = io.StringIO()
    AccessLog("json", out).observe(entry())
    line = json.loads(out.getvalue())
    assert line["id"] == "req_1" and line["route"] == "local" and line["reason"] == "confident"
    assert line["level"] == "info" and line["confidence"] == 0.93 and line["time"].endswith("+00:00")
    assert "degraded" not in line


def test_a_request_as_text_is_one_line() -> None:
    out = io.StringIO()
    AccessLog("text", out).observe(by_teacher(asked='x" route="local\u2028\x1b[2J\nforged', key="bob"))
    (line,) = out.getvalue().splitlines()
    assert " INFO request id=req_1 " in line and " key=bob " in line
    assert r'asked="x\" route=\"local\u2028\u001b[2J\nforged"' in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_bodies_nor_errors_are_logged(log_format: LogFormat) -> None:
    out = io.StringIO()
    AccessLog(log_format, out).observe(
        entry(status=502, error="the teacher says: wrong key sk-1234", local_answer="secret")
    )
    assert "req_1" in out.getvalue() and "warning" in out.getvalue().lower()
    assert "secret" not in out.getvalue() and "sk-1234" not in out.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_other_lines_and_their_tracebacks(log_format: LogFormat) -> None:
    out = io.StringIO()
    with configured(log_format, out) as logger:
        logger.warning("release %s\nis in use\x1b[2J", "v1")
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("failed")
    text = out.getvalue()
    assert "\x1b" not in text and "ValueError: broken" in text
    if log_format == "json":
        first, second = map(json.loads, text.splitlines())
        assert first["message"] == "release v1\nis in use\x1b[2J" and "ValueError: broken" in second["trace"]
    else:
        assert text.splitlines()[0].endswith(r"WARNING release v1\x0ais in use\x1b[2J")


def test_afterwards_all_is_as_before() -> None:
    serve = logging.getLogger("serve")
    before = (list(serve.handlers), serve.level, serve.propagate)
    out = io.StringIO()
    with configured("text", out):
        assert not serve.propagate
    serve.info("after")
    assert (list(serve.handlers), serve.level, serve.propagate) == before and out.getvalue() == ""
