"""The page at `/` with its files, and what it reads: /api/live, /api/releases, /metrics.

The page itself is open: it holds nothing. What it reads needs a key where there are keys. A report is a
link, which cannot send a key, so it carries a ticket: a signature that is good for that report for an hour.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.errors import ApiError
from serve.guard.keys import Caller
from serve.manifest import VERSION, Manifest
from serve.release import ReleaseInvalid, current_version, versions
from serve.watching.gauges import ServedTasks
from serve.watching.live import RECENT, Live
from serve.watching.metrics import Metrics

Authorize = Callable[[Request], Caller]
"""Who asks; raises ApiError 401 (`Door.caller`)."""
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)
"""A report comes from whoever made the release: it may look as it likes, and do nothing."""
TICKET_S = 3600


def routes(
    live: Live,
    metrics: Metrics,
    tasks: ServedTasks,
    *,
    releases: Path,
    authorize: Authorize,
    clock: Callable[[], float] = time.time,
) -> list[Route]:
    """Everything that is looked at.

    Args:
        releases: the folder with one folder a task.
        authorize: lets clients in.
        clock: seconds since 1970.
    """
    site = _Site(live, metrics, authorize)
    shelf = _Shelf(tasks, releases, authorize, clock)
    return [
        *(Route(path, partial(_static, found)) for path, found in _pages().items()),
        Route("/api/live", site.live),
        Route("/metrics", site.metrics),
        Route("/api/releases", shelf.all),
        Route("/api/releases/{task}/{version}/report", shelf.report),
    ]


class _Site:
    def __init__(self, live: Live, metrics: Metrics, authorize: Authorize) -> None:
        self._live = live
        self._metrics = metrics
        self._authorize = authorize

    async def live(self, request: Request) -> Response:
        """GET /api/live?recent=50."""
        _operator(self._authorize, request)
        given = request.query_params.get("recent", "50")
        if not given.isdecimal() or not 0 <= int(given) <= RECENT:
            raise ApiError(400, f"recent is {given[:20]!r}; use 0 to {RECENT}", param="recent")
        return _private(self._live.snapshot(int(given)))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        _operator(self._authorize, request)
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})


class _Shelf:
    """The releases as they lie on disk, newest first, and their reports."""

    def __init__(
        self, tasks: ServedTasks, folder: Path, authorize: Authorize, clock: Callable[[], float]
    ) -> None:
        self._tasks = tasks
        self._folder = folder
        self._authorize = authorize
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    async def all(self, request: Request) -> Response:
        """GET /api/releases."""
        _operator(self._authorize, request)
        found = await run_in_threadpool(self._read)
        return _private({"tasks": found})

    async def report(self, request: Request) -> Response:
        """GET /api/releases/{task}/{version}/report, with a key or a ticket."""
        task, version = request.path_params["task"], request.path_params["version"]
        ticket = request.query_params.get("ticket")
        if ticket is None or not self._is_good(ticket, task, version):
            _operator(self._authorize, request)
        page = await run_in_threadpool(self._report, task, version)
        if page is None:
            raise ApiError(404, f"release {version[:40]} of {task[:40]} has no report; see /api/releases")
        headers = {**ALWAYS, "content-security-policy": REPORT_POLICY, "cache-control": "no-store"}
        return Response(page, headers=headers, media_type="text/html")

    def _read(self) -> list[dict[str, Any]]:
        names = sorted({path.parent.name for path in self._folder.glob("*/current")} | {*self._tasks.served})
        return [self._task(name) for name in names]

    def _task(self, name: str) -> dict[str, Any]:
        folder = self._folder / name
        served = self._tasks.served.get(name)
        try:
            named, problem = current_version(folder), self._tasks.problems.get(name)
        except ReleaseInvalid as error:
            named, problem = None, str(error)
        return {
            "name": name,
            "in_use": served.release.version if served else None,
            "current": named,
            "local": bool(served and served.local),
            "problem": problem,
            "releases": [self._release(folder / version) for version in reversed(versions(folder))],
        }

    def _release(self, folder: Path) -> dict[str, Any]:
        try:
            manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
        except (OSError, ValidationError) as error:
            what = "cannot be read" if isinstance(error, OSError) else "is no manifest"
            return {"version": folder.name, "problem": f"{folder / 'manifest.json'} {what}; roll back"}
        shown = manifest.model_dump(
            include={"version", "base", "method", "data", "teacher", "parity", "scores", "router"}
            | {"latency_ms", "cost_per_1k_usd"}
        )
        return shown | {
            "quantization": manifest.model.quantization,
            "report": self._link(folder) if (folder / "report.html").is_file() else None,
        }

    def _report(self, task: str, version: str) -> bytes | None:
        """The file, where both names are those of a release here: no other path is ever opened."""
        known = {path.parent.name for path in self._folder.glob("*/current")}
        if task not in known or not VERSION.fullmatch(version):
            return None
        try:
            return (self._folder / task / version / "report.html").read_bytes()
        except FileNotFoundError:
            return None

    def _link(self, folder: Path) -> str:
        task, version = folder.parent.name, folder.name
        expires = int(self._clock()) + TICKET_S
        return f"/api/releases/{task}/{version}/report?ticket={self._ticket(task, version, expires)}"

    def _ticket(self, task: str, version: str, expires: int) -> str:
        text = f"{task}/{version}/{expires}".encode()
        return f"{expires}-{hmac.new(self._secret, text, hashlib.sha256).hexdigest()}"

    def _is_good(self, ticket: str, task: str, version: str) -> bool:
        expires = ticket.partition("-")[0]
        if (
            not (expires.isascii() and expires.isdecimal() and len(expires) < 12)
            or int(expires) < self._clock()
        ):
            return False
        return hmac.compare_digest(ticket.encode(), self._ticket(task, version, int(expires)).encode())


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self.content = content
        self.etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        self.media_type = MEDIA[Path(name).suffix]


def _pages() -> dict[str, _File]:
    """The page's files by their paths, read once."""
    folder = files("serve.watching") / "page"
    found = {
        f"/page/{each.name}": _File(each.name, each.read_bytes())
        for each in folder.iterdir()
        if Path(each.name).suffix in MEDIA
    }
    return found | {"/": found["/page/index.html"]}


async def _static(found: _File, request: Request) -> Response:
    """A file of the page; its names stay the same, so browsers ask every time whether it did too."""
    headers = {
        **ALWAYS,
        "content-security-policy": POLICY,
        "cache-control": "no-cache",
        "etag": found.etag,
    }
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers={**headers, "content-type": found.media_type})


def _operator(authorize: Authorize, request: Request) -> None:
    """
    Raises:
        ApiError: 401 without a key; 403 with one that is for some tasks only, since this shows all.
    """
    caller = authorize(request)
    if caller.tasks is not None:
        raise ApiError(
            403,
            f'the key "{caller.name}" is for some tasks only, and this shows all; use a key without that limit',
            kind="permission_error",
            code="insufficient_permissions",
        )


def _private(value: Any) -> Response:
    return JSONResponse(value, headers={**ALWAYS, "cache-control": "no-store"})
