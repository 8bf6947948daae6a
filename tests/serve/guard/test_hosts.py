from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.guard.hosts import HostCheck


async def answer(_: Request) -> Response:
    return Response("in")


async def ask(hosts: tuple[str, ...], headers: dict[str, str]) -> httpx.Response:
    app = HostCheck(Starlette(routes=[Route("/", answer, methods=["GET", "POST"])]), hosts)
    transport: Any = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post("/", headers=headers)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("box.lan", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
async def test_only_names_of_ours_are_answered(host: str, status: int) -> None:
    assert (await ask(("box.lan",), {"host": host})).status_code == status


@pytest.mark.asyncio
async def test_an_ipv6_address_is_known_in_its_brackets() -> None:
    assert (await ask(("FD00::1",), {"host": "[fd00::1]:8000"})).status_code == 200
    assert (await ask(("FD00::1",), {"host": "[fd00::2]:8000"})).status_code == 421


@pytest.mark.asyncio
async def test_a_star_takes_every_name() -> None:
    assert (await ask(("*",), {"host": "anything"})).status_code == 200


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://evil.example", 403),
        ("http://localhost:9000", 403),
        ("null", 403),
        ("http://[", 403),
        ("localhost:8000", 403),
    ],
)
async def test_another_sites_page_may_not_ask(origin: str, status: int) -> None:
    response = await ask((), {"host": "localhost:8000", "origin": origin})
    assert response.status_code == status
    assert not any(name.startswith("access-control") for name in response.headers)
