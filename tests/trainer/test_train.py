"""Training from rows to merged weights; a killed training ends in the same weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_tokenizer
from tests.tiny_run import conversations, tiny_run
from trainer import train
from trainer.errors import DiskError, TrainError
from trainer.runs import Run, read_json, read_jsonl, write_json, write_jsonl
from trainer.settings import TrainSettings
from trainer.template import IGNORED, Template
from trainer.training import checkpoints, loop
from trainer.training.batches import ByLength, collate, split_step

KILLED = "epochs: 12, eval_steps: 7, dropout: 0.1, learning_rate: 0.01"
"""108 steps; the test kills in about the 40th."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted LoRA training."""
    run = tiny_run(tmp_path_factory.mktemp("trained"), train=KILLED)
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
    assert summary["steps"] == 108
    assert 0 < summary["trainable_parameters"] < summary["parameters"]
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 108
    assert losses[-1] < losses[0] / 3
    evaluations = {
        row["step"]: row["eval_loss"] for row in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in row
    }
    assert list(evaluations) == [*range(7, 108, 7), 108]
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
def test_a_killed_run_ends_in_the_same_weights(trained: Run, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train=KILLED)
    metrics = run.folder / "train" / "metrics.jsonl"
    code = "import sys, pathlib; from tests.tiny_run import tiny_run; from trainer import train; "
    code += "train.run(tiny_run(pathlib.Path(sys.argv[1])))"
    args = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(args, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]) as parent:
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 40, parent)
        parent.send_signal(signal.SIGKILL)
    work = run.folder / "train" / "work"
    wait_until(lambda: not running(work / "spec.json"))  # the child dies with its parent
    reached = len([line for line in metrics.read_text().splitlines() if '"loss"' in line])
    assert 30 < reached < 108
    assert not (work / "result.json").exists()
    kept = checkpoints.last_checkpoint(work / "checkpoints")
    assert kept is not None

    train.run(run)
    whole, again = (folder.stage("train") for folder in (trained, run))
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name
    assert curve(whole) == curve(again)
    summaries = [read_json(folder / "summary.json") for folder in (whole, again)]
    for summary in summaries:
        del summary["seconds"], summary["tokens_per_s"]
    assert summaries[0] == summaries[1]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Poll; fail after two minutes, or when the process has ended."""
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.005)


def running(argument: Path) -> bool:
    """Whether a process that was given this argument is alive."""
    import psutil

    return any(str(argument) in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))


def curve(folder: Path) -> list[tuple[int, float]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [(row["step"], row["loss"] if "loss" in row else row["eval_loss"]) for row in rows]


def spec_of(run: Run) -> tuple[dict[str, Any], Path]:
    """What the child would be told, its rows in place."""
    work = run.stage("train") / "work"
    work.mkdir()
    _, spec = train.prepare(run, {})
    return spec, work


def test_full_training_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, method="full", train="epochs: 40, eval_steps: 2, patience: 2, learning_rate: 0.5"
    )
    spec, work = spec_of(run)
    result = loop.train(spec, work)
    assert result["stopped_early"]
    assert result["steps"] == result["best_step"] + 4
    assert result["trainable_parameters"] == result["parameters"]
    kept = load_file(work / "weights" / "model.safetensors")
    best = load_file(work / "checkpoints" / f"checkpoint-{result['best_step']}" / "model.safetensors")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    # killed before the result was written: nothing is trained again
    assert loop.train(spec, work) == result


def test_rows_of_an_example_stay_together_and_long_ones_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    template = Template.freeze(tokenizer)
    lines = conversations(40)
    lines[7]["messages"][1]["content"] = "long " * 500
    rows = train.tokenize(lines, tokenizer, template, TrainSettings(max_length=400), seed=3)
    assert rows.too_long == 1
    assert len(rows.train) + len(rows.evaluate) == 39
    assert len(rows.evaluate) == 4  # two examples of two rows
    again = train.tokenize(lines[::-1], tokenizer, template, TrainSettings(max_length=400), seed=3)
    assert sorted(map(str, again.evaluate)) == sorted(map(str, rows.evaluate))
    assert rows.tokens == sum(len(row["input_ids"]) for row in rows.train)
    with pytest.raises(TrainError, match="raise it to"):
        train.tokenize(lines, tokenizer, template, TrainSettings(max_length=16), seed=3)


def test_padding_is_masked_and_not_learned() -> None:
    batch = collate(
        [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}], pad=9
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    tokenizer = tiny_tokenizer()
    assert train.pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")


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


def test_a_step_passes_at_once_where_it_fits() -> None:
    config = read_config(hidden=192, layers=4, heads=6)
    assert split_step(16, 4, 380, config) == 16
    assert split_step(16, 4, 2048, read_config(hidden=2048, layers=16, heads=32)) == 4


def read_config(hidden: int, layers: int, heads: int) -> Any:
    from transformers import LlamaConfig

    config: Any = LlamaConfig
    return config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)


def test_steps_count_the_last_incomplete_batch() -> None:
    assert train.steps(100, TrainSettings(epochs=3)) == 21
    assert train.steps(3, TrainSettings(epochs=0.5)) == 1


def test_half_written_checkpoints_and_metrics_that_ran_ahead_are_dropped(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 15:
            (tmp_path / f"checkpoint-{step}" / checkpoints.COMPLETE).touch()
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-15").exists()
    metrics = tmp_path / "metrics.jsonl"
    write_jsonl(metrics, [{"step": step, "loss": 1.0, "seconds": step / 2} for step in range(1, 13)])
    with open(metrics, "a") as file:
        file.write('{"step": 13, "lo')
    assert checkpoints.trim_metrics(metrics, 10) == 5.0
    assert [row["step"] for row in read_jsonl(metrics)] == list(range(1, 11))
    assert checkpoints.trim_metrics(metrics, 0) == 0.0
    assert metrics.read_text() == ""


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


def test_without_cuda_the_backend_is_trl() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert train.choose_backend("lora", {}) == "trl"


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
