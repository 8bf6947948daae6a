from __future__ import annotations

from pathlib import Path

import pytest

from serve.__main__ import build, check_binding, main
from serve.errors import SettingsError
from serve.records.journal import Journal
from serve.settings import Settings
from serve.upstreams.teacher import Teachers


def read(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_defaults() -> None:
    settings = read()
    assert settings.home == Path("~/.homestill").expanduser()
    assert (settings.local, settings.runtime, settings.offline) == ("embedded", "embedded", False)
    assert (settings.api_keys, settings.teacher_key, settings.teacher_api_base) == ((), None, None)


@pytest.mark.parametrize(
    ("environment", "local", "runtime"),
    [
        ({"OLLAMA_HOST": "gpu"}, "ollama", "ollama"),
        ({"HOMESTILL_LOCAL": "embedded", "OLLAMA_HOST": "gpu"}, "embedded", "embedded"),
        ({"HOMESTILL_LOCAL": "http://vllm:9/v1/"}, "http://vllm:9/v1", "url"),
        ({"HOMESTILL_LOCAL": "http://vllm:9"}, "http://vllm:9/v1", "url"),
    ],
)
def test_local(environment: dict[str, str], local: str, runtime: str) -> None:
    settings = Settings.from_environment(environment)
    assert (settings.local, settings.runtime) == (local, runtime)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("gpu", "http://gpu:11434"),
        ("gpu:80", "http://gpu:80"),
        ("https://gpu/", "https://gpu"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::1]:5", "http://[::1]:5"),
    ],
)
def test_ollama_host(host: str, url: str) -> None:
    assert read(OLLAMA_HOST=host).ollama_url == url


def test_keys_never_show(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-teacher\n")
    settings = read(
        HOMESTILL_API_KEYS=" one, two", HOMESTILL_TEACHER_KEY_FILE=str(file), OPENAI_API_KEY="other"
    )
    assert (settings.api_keys, settings.teacher_key) == (("one", "two"), "sk-teacher")
    assert "two" not in repr(settings)
    assert "sk-teacher" not in repr(settings)


def test_every_fault_is_listed_with_its_remedy() -> None:
    with pytest.raises(SettingsError) as error:
        read(
            HOMESTILL_LOCAL="olama",
            OLLAMA_HOST="http://x:port",
            HOMESTILL_OFFLINE="maybe",
            HOMESTILL_API_KEYS="a,,b",
            HOMESTILL_TEACHER_API_BASE="api.openai.com",
            HOMESTILL_TEACHER_KEY_FILE="/nowhere/key",
        )
    names = ["HOMESTILL_LOCAL", "OLLAMA_HOST", "HOMESTILL_OFFLINE", "HOMESTILL_API_KEYS"]
    names += ["HOMESTILL_TEACHER_API_BASE", "HOMESTILL_TEACHER_KEY_FILE"]
    assert [fault.split()[0] for fault in error.value.faults] == names
    assert all(";" in fault for fault in error.value.faults)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_binding(host, 8000, Settings(Path()))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "box.local"])  # what is refused
def test_other_machines_need_keys(host: str) -> None:
    with pytest.raises(SettingsError, match="HOMESTILL_API_KEYS"):
        check_binding(host, 8000, Settings(Path()))
    check_binding(host, 8000, Settings(Path(), api_keys=("k",)))


def test_a_port_that_is_none() -> None:
    with pytest.raises(SettingsError, match="--port is 70000"):
        check_binding("127.0.0.1", 70_000, Settings(Path()))


def test_offline_constructs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a teacher client was constructed")

    monkeypatch.setattr(Teachers, "__init__", refuse)
    journal = Journal(f"sqlite:///{tmp_path / 'journal.db'}")
    try:
        build(Settings(tmp_path, offline=True), journal)
        with pytest.raises(AssertionError):
            build(Settings(tmp_path), journal)
    finally:
        journal.close()


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"], {})
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "HOMESTILL_OFFLINE=1 python -m serve" in text


def test_a_fault_is_said_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    environment = {"HOMESTILL_HOME": str(tmp_path)}
    assert main(["--host", "0.0.0.0"], environment) == 2  # what is refused
    assert main([], {**environment, "HOMESTILL_OFFLINE": "perhaps"}) == 2
    said = capsys.readouterr().err
    assert "HOMESTILL_API_KEYS" in said
    assert 'HOMESTILL_OFFLINE is "perhaps"; use 1 or 0' in said
