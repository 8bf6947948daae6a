"""What a training will take is counted from headers, said with its remedy, and near what is measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_base
from tests.tiny_run import conversations, tiny_run
from trainer import estimate, task, train
from trainer.errors import TrainError
from trainer.machine import Machine
from trainer.runs import Run, read_json, write_json, write_jsonl
from trainer.settings import StudentSettings
from trainer.training.shape import Shape

GB = 10**9
CPU = Machine("cpu", "this CPU (2 cores)", 8 * GB, 6 * GB, 2e11)
CARD = Machine("cuda", "NVIDIA L4", 24 * GB, 23 * GB, 1.2e14)
FACTOR = 1.5
"""Within which estimate and measured peak agree."""
WORK = estimate.Work(rows=1000, tokens=800_000, longest=1024, learned=128, shared=400)


def llama_1b() -> Shape:
    """Llama-3.2-1B, from its published configuration."""
    h, wide, kv = 2048, 8192, 512
    sizes = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (wide, h),
        "mlp.up_proj": (wide, h),
        "mlp.down_proj": (h, wide),
    }
    matrices = {f"model.layers.{n}.{name}": size for n in range(16) for name, size in sizes.items()}
    return Shape(1_235_814_400, matrices, 16, h, wide, 32, kv, 128_256, 2_471_645_608)


def student(**values: Any) -> StudentSettings:
    return StudentSettings.model_validate(values)


def test_trained_parameters_are_the_published_ones() -> None:
    assert estimate.trainable(llama_1b(), student()) == 11_272_192  # what Unsloth and PEFT print for r = 16
    assert estimate.trainable(llama_1b(), student(method="full")) == 1_235_814_400


@pytest.mark.parametrize(
    "train_settings",
    [
        {},
        {"dora": True},
        {"target_modules": "attention"},
        {"target_modules": ["down_proj", "self_attn.q_proj"]},
    ],
)
def test_trained_parameters_are_those_of_peft(tmp_path: Path, train_settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    recipe = student(train={"rank": 4, **train_settings})
    shape = Shape.read(tiny_base(tmp_path))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert shape.parameters == model.num_parameters()
    wanted = recipe.train.target_modules
    names = ["q_proj", "k_proj", "v_proj", "o_proj"] if wanted == "attention" else wanted
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names, use_dora=recipe.train.dora)
    assert estimate.trainable(shape, recipe) == get_peft_model(model, config).get_nb_trainable_parameters()[0]


def test_what_is_no_decoder_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"hidden_size": 4})
    with pytest.raises(TrainError, match=r"has no num_attention_heads"):
        Shape.read(tmp_path)


def test_what_fits_and_what_would_help() -> None:
    def verdict(machine: Machine, **values: Any) -> str:
        return estimate.estimate(llama_1b(), student(**values), WORK, machine).lines()[1]

    assert verdict(CARD).endswith("23 GB free on NVIDIA L4: it fits")
    assert "lower student.train.batch_size" in verdict(CARD, train={"batch_size": 64})
    small = replace(CARD, free=2 * GB)
    assert "use student.method qlora, or a smaller base" in verdict(small)
    assert "use a smaller base, or a machine" in verdict(replace(small, free=GB), method="qlora")
    assert "use student.method lora, or a smaller base" in verdict(replace(CARD, free=16 * GB), method="full")
    assert "use a smaller base, or a machine" in verdict(replace(CPU, free=4 * GB))


def test_the_lines_name_everything() -> None:
    found = estimate.estimate(llama_1b(), student(), WORK, CARD, disk_free=5 * GB)
    method, memory, time, disk = found.lines()
    assert method == (
        "lora of unsloth/Llama-3.2-1B-Instruct: 11.3 million of 1.24 billion parameters are trained"
    )
    assert "weights 2.52 GB" in memory
    assert "for 1000 rows, 800 thousand tokens" in time
    assert disk.endswith("5.00 GB are free; free some space, or set HOMESTILL_HOME")


def test_methods_and_batches_cost_what_they_should() -> None:
    def bytes_of(machine: Machine = CARD, **values: Any) -> int:
        return estimate.estimate(llama_1b(), student(**values), WORK, machine).memory_bytes

    assert bytes_of(method="qlora") < bytes_of() < bytes_of(method="full")
    assert bytes_of(train={"batch_size": 8}) > bytes_of(train={"batch_size": 4})
    roomy = replace(CARD, free=80 * GB)
    assert bytes_of(roomy, train={"batch_size": "auto"}) < roomy.free
    assert bytes_of(CARD, method="full") > 18 * 1.2 * GB, "weights, gradients and two moments in 32 bits"


def test_a_cpu_passes_a_whole_step_where_it_fits_and_a_card_what_was_asked_for() -> None:
    def rows(machine: Machine, longest: int, **train: Any) -> int:
        work = replace(WORK, longest=longest, learned=16)
        return estimate.estimate(llama_1b(), student(train=train), work, machine).rows_at_once

    asked = {"batch_size": 4, "accumulation": 4}
    assert [rows(CPU, longest, **asked) for longest in (16, 32, 2048)] == [16, 8, 4]
    assert rows(CARD, 32, **asked) == 4
    assert rows(replace(CARD, free=80 * GB), 32, batch_size="auto", accumulation=4) == 16


def test_a_slower_machine_takes_longer_and_full_takes_more_work() -> None:
    def seconds(machine: Machine, **values: Any) -> float:
        return estimate.estimate(llama_1b(), student(**values), WORK, machine).seconds

    assert seconds(replace(CARD, flops=CARD.flops / 2)) == pytest.approx(2 * seconds(CARD))
    assert seconds(CARD, method="full") > seconds(CARD)
    assert seconds(CPU) > 100 * seconds(CARD)


def test_the_rows_are_known_better_and_better(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, rows=40)
    curated = run.folder / "curate" / "train.jsonl"
    judged = estimate.work_of(run)
    assert (judged.rows, judged.known) == (40, "their length judged by their characters")
    curated.unlink()
    data = "".join(json.dumps({"text": f"a {n}", "label": "b"}) + "\n" for n in range(40))
    (run.task.folder / "data.jsonl").write_text(data)
    captured_later = replace(run, task=task.load(run.task.folder))
    bound = estimate.work_of(captured_later)
    assert bound.tokens == bound.rows * 2048
    assert "nothing is captured yet" in bound.known
    rows = [{"input_ids": [1, 2, 3, n], "labels": [-100, -100, 3, n]} for n in range(5)]
    write_jsonl(run.folder / "train" / "work" / "train.jsonl", rows)
    assert estimate.work_of(run) == estimate.Work(rows=5, tokens=20, longest=4, learned=2, shared=3)


def larger(
    root: Path, *, hidden: int, layers: int, rows: int, words: int, batch: int = 2, **options: Any
) -> Run:
    """A run whose base, rows and batches are of the given size, ready to be trained."""
    run = tiny_run(root, rows=rows, train="epochs: 1", **options)
    file = run.task.folder / "task.yaml"
    file.write_text(file.read_text().replace("batch_size: 2", f"batch_size: {batch}"))
    base = root / "task" / "base"
    shutil.rmtree(base)
    tiny_base(base, hidden=hidden, layers=layers)
    longer = conversations(rows)
    for row in longer:
        row["messages"][1]["content"] += " and more" * words
    write_jsonl(run.folder / "curate" / "train.jsonl", longer)
    return replace(run, task=task.load(run.task.folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": 64, "layers": 2, "rows": 16, "words": 1},
        {"hidden": 512, "layers": 8, "rows": 20, "words": 60, "batch": 8},
        {"hidden": 768, "layers": 8, "rows": 16, "words": 10, "method": "full"},
    ],
    ids=["libraries", "activations", "optimizer"],
)
def test_the_peak_is_near_the_estimate(tmp_path: Path, options: dict[str, Any]) -> None:
    run = larger(tmp_path, **options)
    train.run(run)
    kept = read_json(run.stage("train") / "summary.json")["estimate"]
    assert 1 / FACTOR < kept["memory_ratio"] < FACTOR, kept
