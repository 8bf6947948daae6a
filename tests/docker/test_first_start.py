"""The first API key of a box: made once, told to nobody but the container's user."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.guard.keys import Keys

ROOT = Path(__file__).resolve().parents[2]


def start(home: Path, **environment: str) -> str:
    """What docker/first_start.py says."""
    command = [sys.executable, str(ROOT / "docker" / "first_start.py")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HOMESTILL_HOME": str(home), **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_key_is_made_once_and_not_shown(tmp_path: Path) -> None:
    said = start(tmp_path)
    key = (tmp_path / "first-key").read_text("utf-8").strip()
    assert stat.S_IMODE((tmp_path / "first-key").stat().st_mode) == 0o600
    assert key not in said
    assert Keys((), tmp_path / "keys.json").who(f"Bearer {key}") is not None
    assert key not in (tmp_path / "keys.json").read_text("utf-8")
    (tmp_path / "first-key").unlink()  # noted, and removed
    start(tmp_path)
    assert not (tmp_path / "first-key").exists()


def test_keys_that_are_given_are_enough(tmp_path: Path) -> None:
    start(tmp_path, HOMESTILL_API_KEYS="one,two")
    assert list(tmp_path.iterdir()) == []


class TestEntry:
    """docker/entry, by what the command after it finds in its environment."""

    def entered(self, **environment: str) -> str:
        script = (
            (ROOT / "docker" / "entry").read_text("utf-8").replace("/run/secrets", environment.pop("secrets"))
        )
        command = ["sh", "-c", script, "entry", "env"]
        return subprocess.run(
            command,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def test_secrets_are_passed_on_as_files_and_keys_as_a_list(self, tmp_path: Path) -> None:
        (tmp_path / "teacher_key").write_text("sk-x\n")
        (tmp_path / "api_keys").write_text("one\n\ntwo\n")
        found = self.entered(secrets=str(tmp_path), TEACHER_PROVIDER="ANTHROPIC").splitlines()
        assert f"ANTHROPIC_API_KEY_FILE={tmp_path}/teacher_key" in found
        assert f"HOMESTILL_TEACHER_KEY_FILE={tmp_path}/teacher_key" in found
        assert "HOMESTILL_API_KEYS=one,two" in found
        assert "sk-x" not in "".join(found)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
    def test_a_key_file_that_cannot_be_read_ends_it(self, tmp_path: Path) -> None:
        (tmp_path / "api_keys").write_text("one\n")
        (tmp_path / "api_keys").chmod(0)
        with pytest.raises(subprocess.CalledProcessError):
            self.entered(secrets=str(tmp_path))

    def test_an_empty_file_counts_as_not_given(self, tmp_path: Path) -> None:
        (tmp_path / "teacher_key").touch()
        (tmp_path / "api_keys").touch()
        assert "KEY" not in self.entered(secrets=str(tmp_path))


@pytest.mark.parametrize(("age_s", "code"), [(None, 0), (20, 0), (400, 1)])
def test_a_trainer_whose_pulse_stopped_is_unhealthy(tmp_path: Path, age_s: int | None, code: int) -> None:
    pulse = tmp_path / "homestill.pulse"
    if age_s is not None:
        pulse.touch()
        os.utime(pulse, (time.time() - age_s,) * 2)
    script = (
        (ROOT / "docker" / "trainer_healthy").read_text("utf-8").replace("/tmp/homestill.pulse", str(pulse))
    )
    assert subprocess.run(["sh", "-c", script], timeout=30).returncode == code
