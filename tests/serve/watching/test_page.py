"""The page in a real browser: what a visitor sees, chooses and asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.errors import ApiError
from serve.guard.keys import ANONYMOUS, Caller
from serve.watching.gauges import Drift, Gauges, Queue, Spending
from serve.watching.live import Live
from serve.watching.metrics import Metrics
from serve.watching.site import routes
from tests.serve.endpoint_support import running
from tests.serve.watching.site_support import THRESHOLD, Shelf, by_teacher, entry, write_release

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
INVOICE = {"role": "user", "content": "My invoice is wrong"}
OPENAPI = {
    "paths": {
        "/v1/predict/tickets": {
            "post": {
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/T"}}}
                }
            }
        }
    },
    "components": {
        "schemas": {
            "T": {
                "type": "object",
                "required": ["text"],
                "properties": {
                    "text": {"type": "string"},
                    "limit": {"type": "integer"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
            }
        }
    },
}


@dataclass
class Site:
    """A served page, what it shows, and what it was asked."""

    shelf: Shelf
    live: Live
    drift: dict[str, Drift] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    needs_key: bool = False
    url: str = ""

    def authorize(self, request: Request) -> Caller:
        if self.needs_key and request.headers.get("authorization") != "Bearer good":
            raise ApiError(401, "the API key is missing or unknown", kind="authentication_error")
        return ANONYMOUS

    async def chat(self, request: Request) -> Response:
        self.authorize(request)
        self.asked.append(await request.json())
        decision = {"confidence": 0.9341, "threshold": THRESHOLD, "guarantee": "0.95@0.95", "cost_usd": 0.0}
        message = {"role": "assistant", "content": "billing <b>now</b>"}
        answer = {
            "model": "tickets:1a2b",
            "choices": [{"index": 0, "message": message}],
            "usage": {"prompt_tokens": 312, "completion_tokens": 17},
            "homestill": {"route": "local", "reason": "confident", "overhead_ms": 0.4, **decision},
        }
        return JSONResponse(answer, headers={"x-request-id": "req_abc"})

    async def predict(self, request: Request) -> Response:
        self.asked.append(await request.json())
        calls = [
            {"predictor": "sort", "route": "local", "reason": "confident", "cost_usd": 0.0},
            {"predictor": "rank", "route": "teacher", "reason": "low_confidence", "cost_usd": 0.0021},
        ]
        return JSONResponse(
            {"outputs": {"category": "billing", "priority": 2}, "homestill": {"calls": calls}}
        )

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(OPENAPI)


async def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A page with a release that is in use."""
    shelf = Shelf(tmp_path)
    write_release(tmp_path)
    shelf.take_up("tickets")
    drift: dict[str, Drift] = {}
    gauges = Gauges(
        queue=lambda: Queue(2, 1), spending=lambda: [Spending("all", 3.42, 20.0)], drift=lambda: drift
    )
    made = Site(shelf, Live(shelf, gauges), drift)
    metrics = Metrics(CollectorRegistry(), shelf, gauges)
    app = Starlette(
        routes=[
            *routes(made.live, metrics, shelf, releases=tmp_path, authorize=made.authorize),
            Route("/v1/chat/completions", made.chat, methods=["POST"]),
            Route("/v1/predict/tickets", made.predict, methods=["POST"]),
            Route("/openapi.json", made.openapi),
        ],
        exception_handlers={ApiError: api_error},
    )
    with running(app) as made.url:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    with playwright.sync_playwright() as started:
        # --no-sandbox: tests run as root in containers
        launched = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def visit(browser: Browser, site: Site, *, width: int = 1280, errors: int = 0) -> Iterator[Page]:
    """Open the page; afterwards the console had no more than these errors, and no other host was asked."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(10_000)
    page = context.new_page()
    said: list[str] = []
    hosts: set[str] = set()
    page.on(
        "console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(site.url)
    try:
        yield page
        assert len(said) == errors, said
        assert hosts == {urlsplit(site.url).netloc}
    finally:
        context.close()


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def test_figures_the_threshold_and_the_reasons(browser: Browser, site: Site) -> None:
    for number in range(3):
        site.live.observe(entry(id=f"req_{number}"))
    site.live.observe(by_teacher(id="req_3"))
    with visit(browser, site) as page:
        page.wait_for_selector(".pulse.live")
        assert text(page, "#share") == "75.0 %"
        assert "$3.42" in text(page, "#spend") and "of $20.00" in text(page, "#spend")
        assert "2 at work, 1 waiting" in text(page, "#health")
        line = page.locator("#confidence .threshold")
        assert line.get_attribute("data-threshold") == str(THRESHOLD)
        chart = page.locator("#confidence svg")
        at, width = line.locator("line").get_attribute("x1"), chart.get_attribute("width")
        assert at and width and float(at) == pytest.approx(THRESHOLD * float(width), abs=0.01)
        rows = page.locator("#recent tbody tr:not(.more)").all_inner_texts()
        assert "teacher" in rows[0] and "not confident enough" in rows[0] and "confident enough" in rows[1]
        assert "97.7 %" in text(page, "#releases") and "0.836" in text(page, "#releases")


def test_the_playground_shows_who_answered_and_why(browser: Browser, site: Site) -> None:
    with visit(browser, site) as page:
        page.wait_for_selector(".pulse.live")
        page.get_by_role("radio", name="Message").check()
        page.fill("[name=message]", "My invoice is wrong")
        page.press("[name=message]", "Control+Enter")
        page.wait_for_selector(".verdict")
        answer = text(page, "#play-answer")
        assert "billing <b>now</b>" in answer  # text stays text
        assert "local" in answer and "confident enough" in answer and "0.934" in answer and "0.836" in answer
        assert "at least 95 % of the teacher's quality" in answer and "$0" in answer and "req_abc" in answer
        assert site.asked == [{"model": "tickets", "messages": [INVOICE]}]


def test_the_playground_asks_a_program_by_its_fields(browser: Browser, site: Site) -> None:
    with visit(browser, site) as page:
        page.fill("[data-field=text]", "My invoice")
        page.fill("[data-field=limit]", "3")
        page.fill("[data-field=tags]", "no json")
        page.click("#play-send")
        page.wait_for_selector("#play-answer .problem")
        assert "tags is no JSON" in text(page, "#play-answer") and site.asked == []
        page.fill("[data-field=tags]", '["vat"]')
        page.click("#play-send")
        page.wait_for_selector(".verdict")
        assert site.asked == [{"text": "My invoice", "limit": 3, "tags": ["vat"]}]
        answer = text(page, "#play-answer")
        assert "billing" in answer and "rank" in answer and "not confident enough" in answer


def test_a_reload_and_an_alarm_show_up_by_themselves(browser: Browser, site: Site) -> None:
    with visit(browser, site) as page:
        page.wait_for_selector(".release.used")
        version = write_release(site.shelf.folder, stamp="20261201T000000Z")
        site.shelf.take_up("tickets")
        site.drift["tickets"] = Drift(True, 50, 0.2, 0.1, 0.3, 0.05)
        page.wait_for_selector(f'.release.used[data-version="{version}"]')
        assert page.locator(".release").count() == 2
        assert "20.0 % of audited answers differ" in text(page, "#alarms")


def test_an_opened_request_stays_open_while_others_come(browser: Browser, site: Site) -> None:
    site.live.observe(entry(id="req_1", error="what went wrong"))
    with visit(browser, site) as page:
        page.focus("#recent .disclose")
        page.keyboard.press("Enter")
        assert "what went wrong" in text(page, "#recent")
        site.live.observe(by_teacher(id="req_2"))
        page.wait_for_selector('#recent [data-row="req_2"]')
        assert "what went wrong" in text(page, "#recent")
        assert page.evaluate("document.activeElement.className") == "disclose"


def test_the_key_is_asked_for_and_stays_in_the_tab(browser: Browser, site: Site) -> None:
    site.needs_key = True
    with visit(browser, site, errors=2) as page:  # the browser itself reports each 401
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-problem:not([hidden])")
        page.fill("#key-input", "good")
        page.keyboard.press("Enter")
        page.wait_for_selector(".pulse.live")
        assert page.evaluate("sessionStorage['homestill.key']") == "good"
        assert page.evaluate("Object.keys(localStorage)") == []


def test_it_fits_a_phone(browser: Browser, site: Site) -> None:
    for number in range(30):
        site.live.observe(
            by_teacher(id=f"req_{number}", asked="a-rather-long-name-of-a-model" * 3, error="x" * 300)
        )
    with visit(browser, site, width=360) as page:
        page.wait_for_selector(".release.used")
        for row in page.locator("#recent .disclose").all()[:2]:
            row.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser: Browser, site: Site, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: contrast of 4.5 for every text, computed from the colours that the browser uses."""
    site.live.observe(entry())
    site.live.observe(by_teacher(id="req_2", degraded=True))
    site.live.observe(entry(id="req_3", status=503, route=None))
    with visit(browser, site) as page:
        page.wait_for_selector(".release.used")
        if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") != (scheme == "dark"):
            page.click("#theme-button")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme
        assert page.evaluate(TOO_FAINT) == []


TOO_FAINT = """() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = numbers(getComputedStyle(each).backgroundColor);
      if (colour.length === 3) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("title, .hidden, noscript")) continue;
    const style = getComputedStyle(element);
    const colour = light(numbers(element instanceof SVGElement ? style.fill : style.color));
    const [low, high] = [colour, light(ground(element))].sort((one, other) => one - other);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faint.push(`${element.tagName}.${element.getAttribute("class")} ${contrast.toFixed(2)}`);
  }
  return faint;
}"""
