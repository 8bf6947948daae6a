"""Audits over a real endpoint: drawn from kept answers, asked of the teacher within the rules, journaled."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from serve.config import Config, Egress, TaskRules
from serve.settings import Settings
from tests.serve.endpoint_support import (
    TEACHER_USAGE,
    UNSURE,
    Model,
    completion,
    hybrid,
    journaled,
    local_model,
    local_text,
    question,
    teacher_model,
)
from tests.serve.release_support import write_release


def teacher(label: str) -> Model:
    return Model(lambda _, body: JSONResponse(completion(body["model"], local_text(label), TEACHER_USAGE)))


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
    asked, audit = journaled(served)
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
    assert [len(model.asked), len(journaled(served))] == [1, 1]


def test_rules_and_caps_hold_for_audits_too(tmp_path: Path) -> None:
    for number, rules in enumerate((settings(tmp_path, "never"), settings(tmp_path, daily_usd=0))):
        home = tmp_path / str(number)
        write_release(home / "releases")
        model = teacher("other")
        with hybrid(home, local_model(), model, Settings(home, config=rules.config)) as served:
            assert served.ask(question()).headers["x-homestill-route"] == "local"
        assert model.asked == []
        assert len(journaled(served)) == 1


def test_a_redacted_request_is_audited_redacted(tmp_path: Path) -> None:
    write_release(tmp_path / "releases")
    model = teacher("other")
    with hybrid(tmp_path, local_model(), model, settings(tmp_path, "redact")) as served:
        served.ask(question("I am bob@example.org"))
        served.until_entries(2)
    assert "<EMAIL_1>" in str(model.asked)
    assert "bob@example.org" not in str(model.asked) + str(journaled(served))


def test_a_release_that_came_while_running_has_no_alarm_before_its_first_audit(tmp_path: Path) -> None:
    with hybrid(tmp_path, local_model(), teacher_model(), settings(tmp_path, "allow")) as served:
        write_release(tmp_path / "releases")
        while served.ask(question()).headers["x-homestill-reason"] != "confident":
            pass
        assert 'homestill_drift_alarm{task="tickets"} 0.0' in served.client.get("/metrics").text
