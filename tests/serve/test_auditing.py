"""Audits over a real endpoint: drawn from kept answers, asked of the teacher within the rules, journaled."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.config import Config, Egress, TaskRules
from serve.settings import Settings
from tests.serve.endpoint_support import (
    TEACHER_USAGE,
    UNSURE,
    Model,
    completion,
    hybrid,
    local_model,
    local_text,
    question,
    write_release,
)
from tests.serve.routing.test_strategies import _entries, _json


def teacher(label: str) -> Model:
    return Model(lambda _, body: _json(completion(body["model"], local_text(label), TEACHER_USAGE)))


def settings(home: Path, egress: Egress = "allow", daily_usd: float | None = None) -> Settings:
    return Settings(home, config=Config(defaults=TaskRules(audit=1, egress=egress), daily_usd=daily_usd))


@pytest.mark.parametrize(("label", "agreement"), [("billing", 1.0), ("other", 0.0)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_kept_answer_is_held_against_the_teachers(
    tmp_path: Path, label: str, agreement: float, stream: bool
) -> None:
    write_release(tmp_path / "releases")
    with hybrid(tmp_path, local_model(), teacher(label), settings(tmp_path)) as served:
        assert served.ask(question(stream=stream)).headers["x-homestill-route"] == "local"
        served.until_entries(2)
    asked, audit = _entries(served)
    assert (audit.endpoint, audit.audited, audit.audit, audit.cost_usd) == (
        "audit",
        asked.id,
        agreement,
        0.0003,
    )
    assert audit.local_answer == local_text()


def test_what_the_teacher_answered_itself_is_not_audited(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    model = teacher("billing")
    with hybrid(tmp_path, local_model(UNSURE), model, settings(tmp_path)) as served:
        served.ask(question())
    assert [len(model.asked), len(_entries(served))] == [1, 1]


def test_rules_and_caps_hold_for_audits_too(tmp_path: Path) -> None:
    for number, rules in enumerate((settings(tmp_path, "never"), settings(tmp_path, daily_usd=0))):
        home = tmp_path / str(number)
        write_release(home / "releases")
        model = teacher("other")
        with hybrid(home, local_model(), model, Settings(home, config=rules.config)) as served:
            assert served.ask(question()).headers["x-homestill-route"] == "local"
        assert model.asked == []
        assert len(_entries(served)) == 1


def test_a_redacted_request_is_audited_redacted(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    model = teacher("other")
    with hybrid(tmp_path, local_model(), model, settings(tmp_path, "redact")) as served:
        served.ask(question("I am bob@example.org"))
        served.until_entries(2)
    assert "<EMAIL_1>" in str(model.asked)
    assert "bob@example.org" not in str(model.asked) + str(_entries(served))
