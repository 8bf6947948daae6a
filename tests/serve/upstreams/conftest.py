from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest_asyncio

from serve.upstreams.upstream import DOWN, NO_SUCH_MODEL, Patience, Upstream, connect

Ask = Callable[..., Upstream]


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[Ask]:
    """Makes upstreams by address, and closes them."""
    made: list[Upstream] = []

    def make(url: str, who: str = "teacher", read_s: float = 10.0, **more: Any) -> Upstream:
        if who == "local":
            more = {"down": DOWN | {NO_SUCH_MODEL}, "reconnect": True} | more
        made.append(Upstream(connect(proxies=False), url, who=who, patience=Patience(5.0, read_s), **more))
        return made[-1]

    yield make
    for each in made:
        await each.close()
