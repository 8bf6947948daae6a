"""The least that a gateway in Python can do: bare ASGI in, aiohttp out, nothing looked at.

UPSTREAM=http://… uvicorn bare:app
"""

from __future__ import annotations

import os
from typing import Any

import aiohttp

SESSION: list[aiohttp.ClientSession] = []


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    if not SESSION:
        SESSION.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    url = os.environ["UPSTREAM"] + "/chat/completions"
    async with SESSION[0].post(url, data=body, headers={"content-type": "application/json"}) as answer:
        data = await answer.read()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": head})
    await send({"type": "http.response.body", "body": data})
