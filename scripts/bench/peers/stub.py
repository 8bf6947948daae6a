"""The upstream of the router's benchmark: the same answer to everybody, after a fixed delay.

    python stub.py PORT DELAY_MS

A bare asyncio protocol, so that it is never what is measured. Where log-probabilities are asked for it
answers as the local model would, confidently; `"stream":true` gets a stream that stays open until the
asker hangs up.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

LABEL = "[[ ## label ## ]]\nbilling\n\n[[ ## completed ## ]]"


def answer(*, logprobs: bool) -> bytes:
    tokens = [
        {"token": piece, "logprob": -0.001, "top_logprobs": [{"token": piece, "logprob": -0.001}]}
        for piece in (LABEL[:17], LABEL[17:])
    ]
    body = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "stub",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": LABEL},
                    "finish_reason": "stop",
                    "logprobs": {"content": tokens} if logprobs else None,
                }
            ],
            "usage": {"prompt_tokens": 40, "completion_tokens": 12, "total_tokens": 52},
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(delta: dict[str, str], reason: str | None = None, logprobs: object = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
    data = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "stub", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def piece(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


PLAIN, SURE = answer(logprobs=False), answer(logprobs=True)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKENS = json.loads(SURE.partition(b"\r\n\r\n")[2])["choices"][0]["logprobs"]["content"]
USAGE = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "stub",
    "choices": [],
    "usage": {"prompt_tokens": 40, "completion_tokens": 12, "total_tokens": 52},
}
LOCAL_STREAM = b"".join(
    [
        STREAM_HEAD,
        piece(
            chunk({"role": "assistant", "content": ""})
            + b"".join(chunk({"content": token["token"]}, None, {"content": [token]}) for token in TOKENS)
            + chunk({}, "stop")
            + b"data: "
            + json.dumps(USAGE).encode()
            + b"\n\ndata: [DONE]\n\n"
        ),
        b"0\r\n\r\n",
    ]
)
OPEN_STREAM = STREAM_HEAD + piece(chunk({"role": "assistant", "content": "Hel"}))


class Stub(asyncio.Protocol):
    """One connection, one request at a time on it."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        self._received = b""
        streams, local = b'"stream":true' in body.replace(b" ", b""), b'"logprobs"' in body
        reply = (LOCAL_STREAM if local else OPEN_STREAM) if streams else (SURE if local else PLAIN)
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._write, reply)
        else:
            self._write(reply)

    def _write(self, reply: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(reply)  # type: ignore[attr-defined]  # a stream's transport writes


async def main(port: int, delay_ms: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(delay_ms / 1000), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
