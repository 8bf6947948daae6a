"""What a later stage would miss is found before the teacher is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import PretendTeacher, serving
from tests.tasks import write_task
from tests.tiny import tiny_base
from trainer import preflight, task
from trainer.errors import PreflightError
from trainer.runs import Home


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


def found(folder: Path) -> list[str]:
    """What `homestill check` says against a task."""
    with pytest.raises(PreflightError) as caught:
        preflight.without_network(task.load(folder), Home(folder.parent / "home"))
    return caught.value.faults


def test_check_names_all_that_a_run_would_refuse_or_pay_for_in_vain(tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "a"}\n', encoding="utf-8")
    recipe = {"target_modules": ["w_qkv"], "replay": {"data": str(general)}}
    folder = write_task(
        tmp_path / "words",
        student={"base": "./base", "train": recipe},
        curate={"balance": "labl", "near_duplicate": 1.0},
    )
    tiny_base(folder / "base")
    faults = "\n".join(found(folder))
    assert "the calibrate split holds 5 examples, 30 are needed" in faults
    assert (
        "curate.balance is 'labl', which is no output of the program (label); name an output field" in faults
    )
    assert "target_modules names w_qkv" in faults
    assert "general.jsonl:1: no conversation" in faults
    general.write_bytes(b"\xff\xfe")
    assert "general.jsonl cannot be read: 'utf-8' codec" in "\n".join(found(folder))


def test_a_base_that_is_not_here_is_neither_fetched_nor_a_fault(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words", rows=200, student={"base": "nobody/no-such-model"})
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "check", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "task words is valid: 200 rows" in done.stdout
    assert "student.base nobody/no-such-model is not here yet" in done.stdout


@pytest.mark.parametrize("link", [False, True])
def test_a_program_outside_of_the_folder_is_found_before_it_is_paid_for(tmp_path: Path, link: bool) -> None:
    folder = write_task(tmp_path / "words", rows=200, program=f"{'' if link else '../'}program.py:Sorter")
    (folder / "program.py").rename(tmp_path / "program.py")
    if link:
        (folder / "program.py").symlink_to(tmp_path / "program.py")
    else:
        (folder / "task.yaml").write_text(
            (folder / "task.yaml").read_text("utf-8").replace("metric: ", "metric: ../"), encoding="utf-8"
        )
    (fault,) = found(folder)
    assert fault.endswith(f"lies outside the task folder {folder}; move it in, a release holds its source")


def test_a_field_that_only_the_program_itself_makes_may_be_balanced_by(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "words", rows=200, curate={"balance": "kind", "near_duplicate": 1.0})
    program = folder / "program.py"
    made = program.read_text("utf-8").replace(
        "return self.sort(text=text)", "return dspy.Prediction(label='odd', kind=self.sort(text=text).label)"
    )
    assert any("curate.balance" in fault for fault in preflight.of_task(task.load(folder)))
    program.write_text(made, encoding="utf-8")
    assert preflight.of_task(task.load(folder)) == []
