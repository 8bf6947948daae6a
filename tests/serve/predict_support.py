"""A small program in a release, a router that a test answers for, and the endpoint between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api.chat import Left
from serve.api.door import Door
from serve.config import Config, Egress
from serve.errors import ApiError
from serve.guard.keys import Caller, Keys
from serve.predict import Predict
from serve.release import content_hash
from serve.tasks import Tasks
from serve.upstreams.local import Local
from tests.serve.endpoint_support import completion
from tests.serve.release_support import point, write_release

HELPERS = """
import pydantic

WORD = "one"


class Person(pydantic.BaseModel):
    name: str
    age: int
"""
PROGRAM = """
from typing import Literal

import dspy
from helpers import WORD, Person


class Read(dspy.Signature):
    \"\"\"Read the text.\"\"\"

    text: str = dspy.InputField()
    limit: int = dspy.InputField(desc="most tags")
    tags: list[str] = dspy.OutputField()
    count: int = dspy.OutputField()
    mood: Literal["good", "bad"] = dspy.OutputField()
    person: Person = dspy.OutputField()


class Judge(dspy.Signature):
    \"\"\"Judge the mood.\"\"\"

    text: str = dspy.InputField()
    mood: str = dspy.InputField()
    verdict: bool = dspy.OutputField()


class Reader(dspy.Module):
    def __init__(self):
        super().__init__()
        self.read = dspy.Predict(Read)
        self.judge = dspy.Predict(Judge)

    def forward(self, text, limit):
        import nested.late  # found when it is called

        if text == "break":
            raise ValueError("cannot read this\\nsecond line")
        found = self.read(text=text, limit=limit)
        if text == "short":
            return found
        judged = self.judge(text=text, mood=found.mood)
        return dspy.Prediction(**found, verdict=judged.verdict, word=nested.late.word())
"""
LATE = "from helpers import WORD\n\n\ndef word():\n    return WORD\n"
FILES = {"program.py": PROGRAM, "helpers.py": HELPERS, "nested/late.py": LATE}
TASK = """
name: tickets
program: program.py:Reader
inputs: [text, limit]
teacher: {temperature: 0.5, max_tokens: 777, price_per_1m: {input: 2.0, output: 10.0}}
"""
STATE = {
    "read": ["Read the text.", "text", "limit", "tags", "count", "mood", "person"],
    "judge": ["Judge the mood.", "text", "mood", "verdict"],
}
OUTPUTS: dict[str, Any] = {
    "tags": ["a", "b"],
    "count": 3,
    "mood": "good",
    "person": {"name": "Ann", "age": 30},
}


def release(releases: Path, files: Mapping[str, str] | None = None, **more: Any) -> str:
    """Write a release with the program and make it current; its version."""
    version = write_release(releases, task_yaml=TASK, current=False, **more)
    draft = releases / "tickets" / version
    for name, text in {"program.json": _state(), **FILES, **(files or {})}.items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_text(text)
    manifest = json.loads((draft / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(draft).as_posix(): f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(draft.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest["version"] = f"{version.partition('-')[0]}-{content_hash(manifest['files'])}"
    (draft / "manifest.json").write_text(json.dumps(manifest))
    draft.rename(releases / "tickets" / manifest["version"])
    point(releases, manifest["version"])
    return str(manifest["version"])


def _state() -> str:
    """As DSPy saves it."""
    return json.dumps(
        {
            name: {
                "traces": [],
                "train": [],
                "demos": [],
                "lm": None,
                "signature": {
                    "instructions": told,
                    "fields": [{"prefix": f"{each}:", "description": f"${{{each}}}"} for each in fields],
                },
            }
            for name, (told, *fields) in STATE.items()
        }
    )


def said(**fields: Any) -> str:
    """An answer in the form of DSPy's chat adapter."""
    parts = [
        f"[[ ## {name} ## ]]\n{value if isinstance(value, str) else json.dumps(value)}"
        for name, value in fields.items()
    ]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def decided(route: str, **more: Any) -> dict[str, Any]:
    return {
        "route": route,
        "reason": "confident" if route == "local" else "low_confidence",
        "confidence": 0.9 if route == "local" else 0.4,
        "threshold": 0.8,
        "guarantee": "0.95@0.9",
        "release": "r",
        "degraded": False,
        "cost_usd": 0.0 if route == "local" else 0.002,
        "overhead_ms": 0.1,
        **more,
    }


def usual(asked: Asked) -> str:
    """The reader's answer, or the judge's."""
    return said(**OUTPUTS) if asked.predictor == "read" else said(verdict=True)


@dataclass(frozen=True)
class Asked:
    """One call of the router."""

    body: Mapping[str, Any]
    endpoint: str
    identity: str | None
    caller: str
    egress: str

    @property
    def predictor(self) -> str:
        return "judge" if "verdict" in self.body["messages"][0]["content"] else "read"

    @property
    def text(self) -> str:
        """The input `text`."""
        last: str = self.body["messages"][-1]["content"]
        return last.split("[[ ## text ## ]]\n")[1].split("\n", maxsplit=1)[0]


@dataclass
class FakeRouter:
    """Answers as a test says: text, or an error."""

    answer: Callable[[Asked], Any] = usual
    route: Callable[[Asked], str] = lambda asked: "local" if asked.predictor == "read" else "teacher"
    more: Callable[[Asked], dict[str, Any]] = lambda _: {}
    """Changes to what the answer says of itself."""
    asked: list[Asked] = field(default_factory=list)

    async def __call__(
        self,
        body: Mapping[str, Any],
        *,
        caller: Caller,
        egress: Egress,
        endpoint: str,
        identity: str | None = None,
    ) -> dict[str, Any]:
        asked = Asked(body, endpoint, identity, caller.name, egress)
        self.asked.append(asked)
        found = self.answer(asked)
        text = await found if hasattr(found, "__await__") else found
        return completion("m", text) | {"homestill": decided(self.route(asked), **self.more(asked))}


class FakeLocal:
    """A runtime that holds whatever it is given; nobody asks it."""

    async def start(self, _: Any) -> Any:
        async def retire() -> None: ...

        return SimpleNamespace(retire=retire)


class Endpoint:
    """The predict routes over releases on disk."""

    def __init__(self, home: Path, router: FakeRouter, *, threads: int = 8, config: Config | None = None):
        self.tasks = Tasks(home / "releases", "url", cast(Local, FakeLocal()), None)
        door = Door(Keys((), home / "keys.json"), config or Config())
        self.predict = Predict(self.tasks, router, door, 10_000, threads=threads)
        handlers: dict[Any, Any] = {ApiError: _told, Left: _left}
        self.app = Starlette(routes=self.predict.routes(), exception_handlers=handlers)

    async def __aenter__(self) -> Endpoint:
        await self.tasks.refresh()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.predict.close()
        await self.tasks.close()

    async def post(self, body: Any, path: str = "tickets", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(f"/v1/predict/{path}", json=body, headers=headers)


async def _told(_: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
