"""What a later stage would miss is found before the teacher is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.servers import PretendTeacher, serving
from tests.tasks import write_task


def test_every_missing_thing_is_named_and_nothing_is_asked(tmp_path: Path) -> None:
    teacher = PretendTeacher()
    folder = write_task(tmp_path / "words", student={"base": "nobody/no-such-model"})
    with serving(teacher.app) as address:
        environment = {
            **os.environ,
            "HOMESTILL_TEACHER_API_BASE": f"{address}/v1",
            "HOMESTILL_LOCAL": "ollama",
            "OLLAMA_HOST": "127.0.0.1:9",
            "HOMESTILL_LLAMA_CPP": str(tmp_path),
        }
        command = [sys.executable, "-m", "trainer", "run", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "nobody/no-such-model" in done.stderr
    assert "127.0.0.1:9" in done.stderr
    assert "convert_hf_to_gguf.py" in done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert teacher.asked == []
