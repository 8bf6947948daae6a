"""The page's files and what it reads: who gets what, with which headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.errors import ApiError
from serve.guard.keys import Caller
from serve.watching.gauges import Gauges
from serve.watching.live import Live
from serve.watching.metrics import Metrics
from serve.watching.site import routes
from tests.serve.watching.site_support import SCORES, Shelf, entry, write_release

KEY = {"authorization": "Bearer good"}
LIMITED = {"authorization": "Bearer limited"}


@dataclass
class Site:
    client: httpx.AsyncClient
    shelf: Shelf
    live: Live
    metrics: Metrics
    now: float = 1_800_000_000.0


def authorize(request: Request) -> Caller:
    """Two keys, one of them for a task only."""
    given = request.headers.get("authorization", "")
    if given not in (KEY["authorization"], LIMITED["authorization"]):
        raise ApiError(401, "the API key is missing", kind="authentication_error")
    return Caller("alice", frozenset({"tickets"}) if given == LIMITED["authorization"] else None)


async def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    shelf = Shelf(tmp_path)
    live, metrics = Live(shelf, Gauges()), Metrics(CollectorRegistry(), shelf, Gauges())
    found = routes(live, metrics, shelf, releases=tmp_path, authorize=authorize, clock=lambda: made.now)
    app = Starlette(routes=found, exception_handlers={ApiError: api_error})
    made = Site(
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x"), shelf, live, metrics
    )
    yield made


pytestmark = pytest.mark.asyncio


async def test_the_page_is_open_and_locked_down(site: Site) -> None:
    answer = await site.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_pages_files_are_all_there_and_name_no_other_host(site: Site) -> None:
    seen: set[str] = set()
    todo = {"/"}
    while todo:
        path = todo.pop()
        seen.add(path)
        answer = await site.client.get(path)
        assert answer.status_code == 200, path
        assert not re.findall(r"https?://(?!www\.w3\.org/)", answer.text), path
        found = re.findall(r'(?:src|href)="(/page/[^"]+)"|from "\./([^"]+)"', answer.text)
        todo |= {whole or f"/page/{name}" for whole, name in found} - seen
    assert {"/page/style.css", "/page/playground.js", "/page/charts.js", "/page/icon.svg"} <= seen


async def test_nothing_in_the_page_is_inline(site: Site) -> None:
    text = (await site.client.get("/")).text
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", text)


async def test_a_file_is_sent_again_only_when_it_changed(site: Site) -> None:
    first = await site.client.get("/page/app.js")
    again = await site.client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await site.client.get("/page/app.js", headers={"if-none-match": '"other"'})
    assert other.status_code == 200 and first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/api/live", "/api/releases", "/metrics"])
async def test_figures_need_a_key_for_everything(site: Site, path: str) -> None:
    assert (await site.client.get(path)).status_code == 401
    limited = await site.client.get(path, headers=LIMITED)
    assert limited.status_code == 403 and "some tasks only" in limited.json()["error"]["message"]
    assert (await site.client.get(path, headers=KEY)).status_code == 200


async def test_live_and_metrics(site: Site) -> None:
    site.live.observe(entry())
    site.metrics.observe(entry())
    live = await site.client.get("/api/live?recent=1", headers=KEY)
    assert live.json()["total"]["local_share"] == 1.0 and live.headers["cache-control"] == "no-store"
    metrics = await site.client.get("/metrics", headers=KEY)
    assert "homestill_requests_total{" in metrics.text and metrics.headers["content-type"].startswith(
        "text/plain"
    )


@pytest.mark.parametrize("given", ["-1", "201", "x", "1e9"])
async def test_a_wrong_count_is_refused(site: Site, given: str) -> None:
    answer = await site.client.get("/api/live", params={"recent": given}, headers=KEY)
    assert answer.status_code == 400 and "use 0 to 200" in answer.json()["error"]["message"]


async def test_releases_newest_first_with_their_scores(site: Site) -> None:
    old = write_release(site.shelf.folder, stamp="20261101T000000Z")
    new = write_release(site.shelf.folder)
    site.shelf.take_up("tickets")
    (task,) = (await site.client.get("/api/releases", headers=KEY)).json()["tasks"]
    assert (task["name"], task["in_use"], task["current"], task["problem"]) == ("tickets", new, new, None)
    assert [release["version"] for release in task["releases"]] == [new, old]
    shown = task["releases"][0]
    assert shown["scores"] == SCORES and shown["router"]["certified"] and shown["quantization"] == "q8_0"
    assert "files" not in shown


async def test_a_broken_release_says_so(site: Site) -> None:
    version = write_release(site.shelf.folder)
    (site.shelf.folder / "tickets" / version / "manifest.json").write_text("{}")
    (site.shelf.folder / "tickets" / "current").write_text("nonsense\n")
    (task,) = (await site.client.get("/api/releases", headers=KEY)).json()["tasks"]
    assert "no version" in task["problem"] and "is no manifest" in task["releases"][0]["problem"]


async def test_a_report_is_shown_with_its_ticket_or_a_key(site: Site) -> None:
    version = write_release(site.shelf.folder, report="<p>the report<script>alert(1)</script>")
    (task,) = (await site.client.get("/api/releases", headers=KEY)).json()["tasks"]
    link = task["releases"][0]["report"]
    path = link.partition("?")[0]
    assert path == f"/api/releases/tickets/{version}/report"
    shown = await site.client.get(link)
    assert shown.status_code == 200 and "the report" in shown.text
    policy = shown.headers["content-security-policy"]
    assert "sandbox" in policy and "script-src" not in policy and "default-src 'none'" in policy
    assert (await site.client.get(path, headers=KEY)).status_code == 200
    assert (await site.client.get(path)).status_code == 401


async def test_a_ticket_is_good_for_one_report_and_an_hour(site: Site) -> None:
    one = write_release(site.shelf.folder, stamp="20261101T000000Z")
    other = write_release(site.shelf.folder)
    (task,) = (await site.client.get("/api/releases", headers=KEY)).json()["tasks"]
    link = task["releases"][0]["report"]
    assert (await site.client.get(link.replace(other, one))).status_code == 401
    expires = re.search(r"ticket=(\d+)", link)
    assert expires
    longer = link.replace(expires[1], str(int(expires[1]) + 1))
    assert (await site.client.get(longer)).status_code == 401
    for bad in ("", "-", "x-y", "²-x", "9" * 30, "99999999999-" + "ä" * 64):
        assert (await site.client.get(link.partition("?")[0], params={"ticket": bad})).status_code == 401
    site.now += 3601
    assert (await site.client.get(link)).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/api/releases/tickets/20261120T221500Z-00000000/report",
        "/api/releases/tickets/current/report",
        "/api/releases/tickets/..%2f..%2fsecret/report",
        "/api/releases/..%2f/20261120T221500Z-00000000/report",
        "/api/releases/unknown/20261120T221500Z-00000000/report",
    ],
)
async def test_no_other_file_is_a_report(site: Site, path: str) -> None:
    write_release(site.shelf.folder)
    (site.shelf.folder.parent / "report.html").write_text("a secret")
    answer = await site.client.get(path, headers=KEY)
    assert answer.status_code == 404 and "a secret" not in answer.text
