"""What a call knows of its request."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from serve.config import TaskRules
from serve.guard.keys import ANONYMOUS
from serve.routing.call import Ask, Call


@pytest.mark.asyncio
async def test_others_are_answered_while_a_large_table_is_searched() -> None:
    table = "\n".join(f"{row * 7919},{row * 104729},{row * 1299709}" for row in range(1_000))
    body = {"model": "tickets", "messages": [{"role": "user", "content": f"{table}\nbob@example.org"}]}
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    working = asyncio.create_task(others())
    redacted = await Call(Ask("1", body, ANONYMOUS, egress="redact"), None, TaskRules()).redacted()
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working

    assert redacted.body["messages"][0]["content"].endswith("<EMAIL_1>")
    assert turns > 10
