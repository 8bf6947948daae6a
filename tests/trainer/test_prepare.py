"""What cannot be trained is said before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import tiny_run
from trainer import prepare
from trainer.errors import DataError, PreflightError, TemplateError, TrainError
from trainer.runs import Run, read_json, write_json, write_jsonl


def run_of(root: Path, *, config: dict[str, Any] | None = None, **options: Any) -> Run:
    """A run that has captured nothing yet."""
    run = tiny_run(root, **options)
    (run.folder / "curate" / "train.jsonl").unlink()
    file = root / "task" / "base" / "config.json"
    write_json(file, read_json(file) | (config or {}))
    return run


def test_every_method_that_this_machine_can_train_is_accepted_without_rows(tmp_path: Path) -> None:
    for method in ("lora", "full", "prompt"):
        chosen = prepare.choose(run_of(tmp_path / method, method=method), {})
        assert bool(chosen.modules) == (method == "lora")
        assert chosen.soft == (
            {"first": len(chosen.tokenizer) - 20, "count": 20} if method == "prompt" else {}
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_qlora_without_cuda(tmp_path: Path) -> None:
    with pytest.raises(
        TrainError, match=r"student.method is 'qlora', which needs CUDA and bitsandbytes .*; use lora here"
    ):
        prepare.choose(run_of(tmp_path, method="qlora"), {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_gpu_that_is_required_and_not_there(tmp_path: Path) -> None:
    required = {"HOMESTILL_REQUIRE_GPU": "1"}
    with pytest.raises(PreflightError, match="HOMESTILL_REQUIRE_GPU is set, and torch finds no CUDA device"):
        prepare.choose(run_of(tmp_path, environment=required), required)


def test_a_soft_prompt_on_a_base_that_cannot_carry_it(tmp_path: Path) -> None:
    gemma = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    run = run_of(tmp_path, method="prompt", config=gemma)
    (run.task.folder / "base" / "tokenizer.model").touch()
    with pytest.raises(
        TrainError, match=r"'prompt', and llama.cpp serves gemma2 .*; use lora, or a base of the Llama"
    ):
        prepare.choose(run, {})


def test_layers_that_the_base_has_not(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"target_modules names w_qkv, which .* has not; use all-linear"):
        prepare.choose(run_of(tmp_path, train="target_modules: [w_qkv]"), {})


def test_general_data_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "a"}\n')
    run = run_of(tmp_path, train=f"replay: {{data: {tmp_path / 'general.jsonl'}}}")
    with pytest.raises(DataError, match=r"general\.jsonl:1: no conversation"):
        prepare.choose(run, {})
    (tmp_path / "general.jsonl").unlink()
    with pytest.raises(TrainError, match=r"general\.jsonl, which does not exist; correct the path"):
        prepare.choose(run, {})


def test_a_template_that_cannot_be_frozen(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (run.task.folder / "base" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(TemplateError):
        prepare.choose(run, {})


def test_too_little_general_data_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_jsonl(tmp_path / "general.jsonl", [one])
    run = tiny_run(tmp_path, train=f"replay: {{data: {tmp_path / 'general.jsonl'}, share: 0.5}}")
    (run.stage("train") / "work").mkdir()
    about = prepare.prepare(run, {}).about
    assert (about["rows"], about["replayed_rows"]) == (37, 1)
    assert "general.jsonl holds enough for 3 % of the rows, student.train.replay.share is 50 %" in caplog.text
    assert "parameters are trained\nmemory: about" in caplog.text
