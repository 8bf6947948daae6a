from __future__ import annotations

from pathlib import Path

import pytest

from serve.config import Config, TaskRules, load
from serve.errors import SettingsError


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_without_a_file_everything_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path / "serve.yaml") == Config()
    assert load(write(tmp_path, "")) == Config()


def test_a_tasks_own_rules_go_before_the_defaults(tmp_path: Path) -> None:
    text = "defaults: {egress: redact, audit: 0.5}\ntasks: {tickets: {audit: 0.02, strategy: shadow}}\n"
    config = load(write(tmp_path, text))
    assert config.rules("tickets") == TaskRules(strategy="shadow", egress="redact", audit=0.02)
    assert config.rules("other") == config.rules(None) == TaskRules(egress="redact", audit=0.5)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    text = "defaults: {strategy: best, audit: 2}\ntasks: {a: {egres: never}}\ndaily_usd: -1\nlocal: {queue: 1.5}\n"
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, text))
    told = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 5
    for part in (
        "defaults.strategy is 'best'",
        "defaults.audit",
        "tasks.a.egres is no setting",
        "daily_usd",
        "local.queue",
    ):
        assert part in told


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "daily_usd: .nan", "daily_usd: .inf", "\x00"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"serve\.yaml"):
        load(write(tmp_path, text))
