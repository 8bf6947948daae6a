"""Training from rows to merged weights; a killed training ends in the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_tokenizer
from tests.tiny_run import conversations, tiny_run
from tests.trainer.training.support import ONE_THREAD, curve, running, wait_until
from trainer import train
from trainer.errors import DiskError, TrainError
from trainer.runs import Run, read_json, read_jsonl, write_json, write_jsonl
from trainer.settings import TrainSettings
from trainer.template import IGNORED, Template
from trainer.training import checkpoints, rows
from trainer.training.batches import ByLength, collate

KILLED = "epochs: 6, eval_steps: 7, dropout: 0.1, learning_rate: 0.01"
"""54 steps; the test kills behind the 18th and the 36th."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted LoRA training."""
    run = tiny_run(tmp_path_factory.mktemp("trained"), train=KILLED, environment=ONE_THREAD)
    train.run(run)
    return run


def test_the_outputs_are_complete(trained: Run) -> None:
    folder = trained.stage("train")
    assert {file.name for file in folder.iterdir()} == {
        "model",
        "adapter",
        "metrics.jsonl",
        "summary.json",
        "train.log",
    }
    summary = read_json(folder / "summary.json")
    assert summary["backend"] == "trl"
    assert summary["rows"] + summary["eval_rows"] == 40
    assert summary["steps"] == 54
    assert 0 < summary["trainable_parameters"] < summary["parameters"]
    assert summary["estimate"]["measured_peak_bytes"] == summary["peak_bytes"] > 100_000_000
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 54
    assert losses[-1] < losses[0] / 2
    evaluations = {
        row["step"]: row["eval_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row
    }
    assert list(evaluations) == [*range(7, 54, 7), 54]
    assert summary["best_eval_loss"] == evaluations[summary["best_step"]] == min(evaluations.values())


def test_the_merged_model_is_base_plus_adapter_in_16_bits(trained: Run) -> None:
    from peft import PeftModel

    folder = trained.stage("train")
    ids = torch.tensor([[3, 5, 7, 11, 13]])
    base: Any = AutoModelForCausalLM.from_pretrained(trained.task.folder / "base", dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(base, folder / "adapter")
    merged: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        difference = adapted(input_ids=ids).logits - merged.float()(input_ids=ids).logits
    assert (
        difference.abs().max() < 0.1
    )  # bfloat16 keeps 8 bits; an adapter that is not merged is off by more than 1
    assert "lm_head.weight" not in load_file(folder / "model" / "model.safetensors")


def test_the_model_folder_carries_the_frozen_template_and_both_generations_of_keys(trained: Run) -> None:
    model = trained.stage("train") / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = Template.freeze(tiny_tokenizer())
    assert (
        tokenizer.chat_template
        == template.jinja
        == read_json(model / "tokenizer_config.json")["chat_template"]
    )
    assert read_json(trained.stage("train") / "summary.json")["template_sha256"] == template.sha256
    config, base = read_json(model / "config.json"), read_json(trained.task.folder / "base" / "config.json")
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: base["rope_parameters"][key] for key in config["rope_scaling"]}
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == base["eos_token_id"]
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twice_ends_in_the_same_weights(trained: Run, tmp_path: Path) -> None:
    """kill -9 on the stage, then on the training process; dropout draws on, so the random state counts."""
    run = tiny_run(tmp_path, train=KILLED, environment=ONE_THREAD)
    work, metrics = run.folder / "train" / "work", run.folder / "train" / "metrics.jsonl"
    reached = []
    for lines, victim in ((20, "stage"), (40, "training")):
        with stage_process(tmp_path, tmp_path / f"{victim}.err") as parent:
            wait_until(partial(longer_than, metrics, lines), parent)
            os.kill(parent.pid if victim == "stage" else running(work / "spec.json")[0], signal.SIGKILL)
        wait_until(lambda: not running(work / "spec.json"))  # the child dies with its parent
        reached.append(len([line for line in metrics.read_text().splitlines() if '"loss"' in line]))
        assert not (work / "result.json").exists()
        assert checkpoints.last_checkpoint(work / "checkpoints") is not None
    assert 15 < reached[0] < reached[1] < 54
    assert "trainer.training.loop was killed by signal 9" in (tmp_path / "training.err").read_text()

    train.run(run)
    whole, again = (folder.stage("train") for folder in (trained, run))
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    assert curve(whole / "work") == curve(again / "work")
    summaries = [read_json(folder / "summary.json") for folder in (whole, again)]
    for summary in summaries:
        del summary["seconds"], summary["tokens_per_s"], summary["peak_bytes"], summary["estimate"]
    assert summaries[0] == summaries[1]


def stage_process(root: Path, errors: Path) -> subprocess.Popen[bytes]:
    """The train stage of the tiny run in `root`, in a process of its own."""
    code = "import sys, pathlib; from tests.tiny_run import tiny_run; from trainer import train; "
    code += f"train.run(tiny_run(pathlib.Path(sys.argv[1]), environment={ONE_THREAD}))"
    args = [sys.executable, "-c", code, str(root)]
    with open(errors, "wb") as file:
        return subprocess.Popen(args, stderr=file, cwd=Path(__file__).parents[2])


def longer_than(file: Path, lines: int) -> bool:
    return file.exists() and file.read_bytes().count(b"\n") > lines


def test_rows_of_an_example_stay_together_and_long_ones_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    template = Template.freeze(tokenizer)
    lines = conversations(40)
    lines[7]["messages"][1]["content"] = "long " * 500
    found = rows.tokenize(lines, tokenizer, template, TrainSettings(max_length=400), seed=3)
    assert found.too_long == 1
    assert len(found.train) + len(found.evaluate) == 39
    assert len(found.evaluate) == 4  # two examples of two rows
    again = rows.tokenize(lines[::-1], tokenizer, template, TrainSettings(max_length=400), seed=3)
    assert sorted(map(str, again.evaluate)) == sorted(map(str, found.evaluate))
    assert found.tokens == sum(len(row["input_ids"]) for row in found.train)
    with pytest.raises(TrainError, match="raise it to"):
        rows.tokenize(lines, tokenizer, template, TrainSettings(max_length=16), seed=3)


def test_padding_is_masked_and_not_learned() -> None:
    batch = collate(
        [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}], pad=9
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    tokenizer = tiny_tokenizer()
    assert rows.pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")


def test_the_order_follows_from_seed_and_epoch_and_pads_little() -> None:
    lengths = [(index * 37) % 101 for index in range(103)]
    order = ByLength(lengths, 4, seed=1)
    first = list(order)
    assert sorted(first) == list(range(103))
    assert first == list(order)
    order.set_epoch(1)
    assert first != list(order)
    wasted = sum(max(part) * len(part) - sum(part) for part in steps_of([lengths[row] for row in first]))
    unsorted = sum(max(part) * len(part) - sum(part) for part in steps_of(lengths))
    assert wasted < unsorted / 4


def steps_of(values: list[int]) -> list[list[int]]:
    return [values[at : at + 4] for at in range(0, len(values), 4)]


def test_steps_count_the_last_incomplete_batch() -> None:
    assert rows.steps(100, TrainSettings(epochs=3)) == 21
    assert rows.steps(3, TrainSettings(epochs=0.5)) == 1


def test_checkpoints_that_a_killed_training_left_behind_its_end_are_removed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    write_json(run.stage("train") / "summary.json", {})
    write_json(run.stage("train") / "work" / "checkpoints" / "state.json", {})
    train.run(run)
    assert [file.name for file in run.stage("train").iterdir()] == ["summary.json"]


def test_measured_time_is_told_as_it_was_measured() -> None:
    compared = {"measured_peak_bytes": 2e9, "memory_bytes": 1e9, "seconds": 1.0, "time_ratio": 0.001}
    told = "memory: 2.00 GB at most, 1.00 GB expected; time: 1400 s, 1 s expected"
    assert train._said(compared, 1400.0) == told


def test_no_space_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, disk_free=lambda _: 1_000_000)
    with pytest.raises(DiskError, match="training needs"):
        train.run(run)
    assert not (run.folder / "train" / "model").exists()


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a name"])
def test_an_unknown_base_is_said_with_a_remedy(tmp_path: Path, name: str) -> None:
    run = tiny_run(tmp_path, environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task.read_text().replace("./base", name))
    run = tiny_run(tmp_path, environment={"HF_HUB_OFFLINE": "1"})
    with pytest.raises(
        TrainError, match=f"student.base is '{name}'.*hubs are switched off.*correct the name"
    ):
        train.inputs(run)


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (tmp_path / "task" / "base" / "model.safetensors").unlink()
    with pytest.raises(TrainError, match=r"holds no \*.safetensors"):
        train.inputs(run)


def test_a_failed_training_names_its_last_line_and_log(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    config = tmp_path / "task" / "base" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"hidden_size": 128})
    with pytest.raises(TrainError, match=r"trainer.training.loop ended with code 1: .*train\.log"):
        train.run(run)
    assert not (run.folder / "train" / "summary.json").exists()


def test_inputs_change_with_rows_and_recipe_only(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = train.inputs(run)
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task.read_text().replace("q8_0", "f16"))
    assert train.inputs(tiny_run(tmp_path)) == before
    task.write_text(task.read_text().replace("epochs: 1", "epochs: 2"))
    assert train.inputs(tiny_run(tmp_path)) != before
    write_jsonl(run.folder / "curate" / "train.jsonl", conversations(38))
    assert train.inputs(run) != before
