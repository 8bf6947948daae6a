"""The API model behind the endpoint: where it is, what it is called there, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve.release import Release, ReleaseInvalid
from serve.settings import OPENAI, Settings
from serve.upstreams.upstream import Connect, Upstream


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, usage: Any) -> float | None:
        """US dollars for OpenAI's `usage` object; None where it does not say how many tokens."""
        if not isinstance(usage, Mapping):
            return None
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(completion, int):
            return None
        return (self.input * prompt + self.output * completion) / 1e6


@dataclass(frozen=True)
class Teacher:
    """A teacher. `model` None: the one that the client names. `price` None: not known, and never taken for 0."""

    upstream: Upstream
    model: str | None
    price: Price | None


class Teachers:
    """The teachers of all releases, each address with its own connections. Not constructed offline."""

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self._settings = settings
        self._connect = connect
        self._upstreams: dict[str, Upstream] = {}

    def before_release(self) -> Teacher:
        """Who answers for a task that has no release."""
        return Teacher(
            self._at(self._settings.teacher_api_base or OPENAI), self._settings.teacher_model, price=None
        )

    def of(self, release: Release) -> Teacher:
        """The teacher that the release was certified against. Its address may be another one than then.

        Raises:
            ReleaseInvalid: the release does not say where a teacher that is not OpenAI's can be asked.
        """
        section = _teacher_section(release.task)
        base = self._settings.teacher_api_base or section.get("api_base")
        provider, _, name = release.manifest.teacher.model.rpartition("/")
        if base is None and provider not in ("", "openai"):
            raise ReleaseInvalid(
                [
                    f"the teacher is {release.manifest.teacher.model}, which needs an OpenAI-compatible address; "
                    "set HOMESTILL_TEACHER_API_BASE"
                ]
            )
        if provider:  # dspy.LM's names begin with the provider, which the provider itself does not know
            name = release.manifest.teacher.model.partition("/")[2]
        return Teacher(self._at((base or OPENAI).rstrip("/")), name, _price(section))

    async def close(self) -> None:
        for upstream in self._upstreams.values():
            await upstream.close()

    def _at(self, base_url: str) -> Upstream:
        if base_url not in self._upstreams:
            self._upstreams[base_url] = Upstream(
                self._connect, base_url, who="teacher", key=self._settings.teacher_key
            )
        return self._upstreams[base_url]


def _teacher_section(task: Path) -> Mapping[str, Any]:
    """`teacher` of the release's task.yaml; load has checked the file's hash, and the trainer its content."""
    if not task.is_file():
        return {}
    try:
        section = (yaml.safe_load(task.read_text(encoding="utf-8")) or {}).get("teacher") or {}
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ReleaseInvalid([f"{task} cannot be read ({error}); run release again, or roll back"]) from error
    if not isinstance(section, Mapping):
        raise ReleaseInvalid(
            [f"{task}: teacher is {json.dumps(section)}, no section; run release again, or roll back"]
        )
    return section


def _price(section: Mapping[str, Any]) -> Price | None:
    given = section.get("price_per_1m")
    return Price(float(given["input"]), float(given["output"])) if given else None
