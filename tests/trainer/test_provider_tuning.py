"""What the provider's workshop makes: runs that are found again, models that are kept, and weights to tune further."""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest

from tests.tiny import tiny_base
from tests.trainer.test_provider import ROWS
from tests.trainer.training.support import running, wait_until
from trainer.errors import ExportError, StoppedError, TrainError
from trainer.export import SCRIPT
from trainer.pipeline import Stage
from trainer.provider import OllamaProvider
from trainer.provider.tuning import Workshop, _execute, _tuned_folder, student_settings
from trainer.runs import Home, Run, locked, read_json
from trainer.runtimes.local import Registration, record
from trainer.settings import StudentSettings


def test_models_are_found_by_name_while_their_files_are_there(tmp_path: Path) -> None:
    workshop = Workshop("student", Home(tmp_path), {})
    gguf = tmp_path / "runs" / "student" / "r1" / "export" / "model.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"x")
    made = Registration("embedded", "student:1", "a" * 64, 512, gguf=str(gguf))
    record(gguf.parents[1], {"model": made})
    assert workshop.find("student:1") == made
    assert workshop.find("student:2") is None
    assert workshop.weights("student:1") is None
    weights = tmp_path / "runs" / "student" / "r1" / "train" / "model"
    weights.mkdir(parents=True)
    assert workshop.weights("student:1") == weights
    gguf.unlink()
    assert workshop.find("student:1") is None


def test_a_home_that_the_workshop_makes_is_its_owners_alone(tmp_path: Path) -> None:
    run = Workshop("student", Home(tmp_path / "home"), {}).run(student_settings("some/base"), lambda _: "r1")
    run.store.close()
    assert run.home.root.stat().st_mode & 0o077 == 0


def test_a_tuned_model_is_tuned_further_from_its_own_weights(tmp_path: Path) -> None:
    made = Registration("embedded", "student:1", "a" * 64, 512, gguf="x")
    record(tmp_path / "runs" / "student" / "r1", {"model": made})
    weights = tmp_path / "runs" / "student" / "r1" / "train" / "model"
    weights.mkdir(parents=True)
    with OllamaProvider("hub/base", home=tmp_path, runtime="embedded", environment={}) as provider:
        assert provider.weights("openai/student:1") == str(weights)
        assert provider.weights("ollama_chat/llama3.2") == "hub/base"
        assert provider.weights("hub/other") == "hub/other"  # an LM's finetuning_model


def test_a_tuned_model_whose_weights_are_gone_is_not_taken_for_the_base(tmp_path: Path) -> None:
    with OllamaProvider("hub/base", home=tmp_path, runtime="embedded", environment={}) as provider:
        with pytest.raises(TrainError, match=r"student:0123456789ab has no weights in .*tune the base again"):
            provider.weights("openai/student:0123456789ab")
        assert provider.weights("ollama_chat/student:base-0123456789ab") == "hub/base"
        assert provider.weights("ollama_chat/other:0123456789ab") == "hub/base"


def test_a_tuned_lm_answers_as_long_as_it_was_made_to_and_is_tuned_further_itself(tmp_path: Path) -> None:
    workshop = Workshop("student", Home(tmp_path), {})
    run = workshop.run(student_settings("b", {"max_tokens": 300}), lambda _: "r1")
    run.store.close()
    record(run.folder, {"model": Registration("embedded", "student:1", "a" * 64, 512, gguf="x")})
    with OllamaProvider("b", home=tmp_path, runtime="embedded", environment={}) as provider:
        assert provider.lm("student:1").kwargs["max_tokens"] == 300
        assert provider.lm("student:2").kwargs["max_tokens"] == 512
        for wanted, expected in (({"max_tokens": 300}, 300), ({}, 512)):
            job = provider.TrainingJob(train_kwargs=wanted)
            lm = provider.lm("student:2", finetuning_model="hub/other")
            job.set_result(lm.copy(model="ollama_chat/student:1"))
            assert job.result().kwargs["max_tokens"] == expected
            assert job.result().finetuning_model is None


def folder_of(home: Path, student: StudentSettings, rows: list[Any]) -> str:
    run = Workshop("student", Home(home), {}).run(student, partial(_tuned_folder, rows))
    run.store.close()
    return run.name


def test_a_run_is_found_by_content_wherever_it_lies(tmp_path: Path) -> None:
    base, general = tiny_base(tmp_path / "base"), tmp_path / "general.jsonl"
    general.write_text("one")
    replay = {"replay": {"data": str(general)}}
    before = folder_of(tmp_path, student_settings(str(base), replay), ROWS)
    shutil.copytree(base, tmp_path / "moved")
    assert folder_of(tmp_path, student_settings(str(tmp_path / "moved"), replay), ROWS) == before
    assert folder_of(tmp_path, student_settings(str(base), replay, {"epochs": 9}), ROWS) != before
    general.write_text("two")
    assert folder_of(tmp_path, student_settings(str(base), replay), ROWS) != before
    general.write_text("one")
    (base / "model.safetensors").write_bytes(b"renewed")
    assert folder_of(tmp_path, student_settings(str(base), replay), ROWS) != before


def test_a_finished_stage_is_kept_when_a_package_was_upgraded(tmp_path: Path) -> None:
    run = Workshop("student", Home(tmp_path), {}).run(student_settings("b"), lambda _: "r1")
    acted: list[str] = []

    def stage(name: str, version: str) -> Stage:
        def act(run: Run) -> None:
            acted.append(name)

        return Stage(name, lambda _: {"version": version}, act)

    def stages(version: str) -> list[Stage]:
        return [stage(name, version) for name in ("train", "export", "register")]

    _execute(run, stages("1"))
    (run.folder / "train" / "model").mkdir()
    _execute(run, stages("2"))
    run.store.close()
    assert acted == ["train", "export", "register", "register"]
    assert (run.folder / "train" / "model").is_dir()


def test_what_is_made_already_is_had_while_another_is_being_made_and_the_rest_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workshop, acted = Workshop("student", Home(tmp_path), {}), []
    made = workshop.run(student_settings("b"), lambda _: "r1")
    new = workshop.run(student_settings("b"), lambda _: "r2")

    def act(run: Run) -> None:
        acted.append(run.name)

    stages = [Stage(name, lambda run: {"run": run.name}, act) for name in ("train", "register")]
    _execute(made, stages)
    with locked(tmp_path / "runs" / "student", "student", "r3"):
        _execute(made, stages)
        waiting = threading.Thread(target=_execute, args=(new, stages))
        waiting.start()
        wait_until(lambda: "r2 waits for r3" in caplog.text)
        assert acted == ["r1"] * 2
    waiting.join(timeout=30)
    assert acted == ["r1"] * 2 + ["r2"] * 2
    for run in (made, new):
        run.store.close()


def test_a_closed_provider_makes_nothing_more_and_can_be_used_again(tmp_path: Path) -> None:
    provider = OllamaProvider("b", home=tmp_path, runtime="embedded", environment={})
    run = provider._workshop.run(student_settings("b"), lambda _: "r1")
    acted: list[str] = []

    def train(run: Run) -> None:
        acted.append("train")
        provider.close()

    stages = [Stage("train", lambda _: {}, train), Stage("register", lambda _: {}, train)]
    with pytest.raises(StoppedError, match="the same call goes on"):
        _execute(run, stages)
    again = provider._workshop.run(student_settings("b"), lambda _: "r1")
    _execute(again, stages)
    assert acted == ["train", "train"]
    for one in (run, again):
        one.store.close()


@pytest.mark.slow
def test_a_training_ends_with_its_provider(tmp_path: Path) -> None:
    options: dict[str, Any] = {"home": tmp_path / "home", "runtime": "embedded"}
    options["student"] = {
        "epochs": 100,
        "eval_steps": 5,
        "patience": 10_000,
        "quantize": "f16",
        "context": 256,
    }
    with (
        pytest.raises(ZeroDivisionError),
        OllamaProvider(tiny_base(tmp_path / "base"), **options) as provider,
    ):
        job = dspy.LM("ollama_chat/x", provider=provider).finetune(ROWS * 30, "chat")
        wait_until(lambda: any(tmp_path.glob("home/**/metrics.jsonl")), seconds=300)
        raise ZeroDivisionError
    with pytest.raises(StoppedError):
        job.result(timeout=30)
    job.thread.join(timeout=30)
    (spec,) = tmp_path.glob("home/**/train/work/spec.json")
    assert not running(spec)


@pytest.mark.slow
def test_what_was_trained_is_kept_when_a_later_stage_failed(tmp_path: Path) -> None:
    broken = tmp_path / "llama.cpp"
    broken.mkdir()
    (broken / SCRIPT).write_text("raise SystemExit('no converter')")
    options: dict[str, Any] = {"home": tmp_path / "home", "runtime": "embedded"}
    options |= {"student": {"epochs": 1, "quantize": "f16", "context": 256}}
    base = tiny_base(tmp_path / "base")
    environment = {**os.environ, "HOMESTILL_LLAMA_CPP": str(broken)}
    with OllamaProvider(base, environment=environment, **options) as provider:
        failed = dspy.LM("openai/x", provider=provider).finetune(ROWS, "chat")
        with pytest.raises(ExportError, match="ended with code"):
            failed.result()
        failed.thread.join()
    (record,) = (tmp_path / "home" / "runs" / "student").glob("*/train/stage.json")
    trained = read_json(record)
    with OllamaProvider(base, **options) as provider:
        assert dspy.LM("openai/x", provider=provider).finetune(ROWS, "chat").result().model
    assert read_json(record) == trained
