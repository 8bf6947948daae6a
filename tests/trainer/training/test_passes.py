"""A step is the same however it is cut: by memory that runs out, or between processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import tiny_run
from tests.trainer.training.support import ONE_THREAD, curve, prepared, trained
from trainer import process, train
from trainer.runs import read_json, read_jsonl, write_jsonl
from trainer.training import loop, memory
from trainer.training.batches import collate
from trainer.training.launch import LAUNCH, environment, join, processes, reason, words

ROOT = Path(__file__).parents[3]
RECIPE = "epochs: 1, learning_rate: 0.01, eval_steps: 4, dropout: 0.0"
"""9 steps of 4 rows."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A training that memory suffices for."""
    return trained(tmp_path_factory.mktemp("plain"), RECIPE)


class Scarce:
    """Memory that runs out in the passes of the given numbers; remembers the rows of every pass."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.rows: list[int] = []

    def __call__(self, rows: int) -> None:
        self.rows.append(rows)
        if len(self.rows) in self.failing:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")


def test_out_of_memory_halves_the_passes_and_changes_nothing_else(
    plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    # the third step fails whole; two steps on, the second of its two passes: half a gradient is thrown away
    scarce = Scarce(3, 9)
    result, work = trained(tmp_path, RECIPE, before_pass=scarce)
    assert scarce.rows[:9] == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert scarce.rows[9:] == [1] * 4 * 5  # the step begins again, four more follow
    whole, before = plain
    assert whole["rows_at_once"] == 4
    assert result["rows_at_once"] == 1
    assert {key: result[key] for key in ("steps", "best_step", "stopped_early")} == {
        key: whole[key] for key in ("steps", "best_step", "stopped_early")
    }
    assert [step for step, _ in curve(work)] == [step for step, _ in curve(before)]
    assert [loss for _, loss in curve(work)] == pytest.approx([loss for _, loss in curve(before)], rel=1e-5)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (work, before))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in other)


def test_with_dropout_a_step_begins_again_with_the_random_state_that_it_began_with(tmp_path: Path) -> None:
    class Late(Scarce):
        """Fails when random numbers were drawn already."""

        def __call__(self, rows: int) -> None:
            if len(self.rows) + 1 in self.failing:
                torch.rand(1000)
            super().__call__(rows)

    recipe = "epochs: 0.3, dropout: 0.3, eval_steps: 9"
    curves = [
        curve(trained(tmp_path / type(scarce).__name__, recipe, before_pass=scarce)[1])
        for scarce in (Scarce(1), Late(1))
    ]
    assert curves[0] == curves[1]


def test_where_not_one_row_fits_the_training_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not enough memory") as caught:
        trained(tmp_path, RECIPE, before_pass=Scarce(1, 2, 3))
    assert memory.out_of_memory(caught.value)


def test_other_errors_are_not_taken_for_memory() -> None:
    assert memory.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert memory.out_of_memory(MemoryError())
    assert not memory.out_of_memory(RuntimeError("The size of tensor a (3) must match"))
    assert not memory.out_of_memory(ValueError("out of memory"))


def test_the_evaluation_loss_is_the_mean_of_the_learned_tokens(plain: tuple[dict[str, Any], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, work = plain
    base = work.parents[2] / "task" / "base"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, work / "adapter").eval()
    rows = read_jsonl(work / "eval.jsonl")
    summed, tokens = 0.0, 0
    for row in rows:
        batch = collate([row], pad=0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        learned = batch["labels"][:, 1:].flatten()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), learned, reduction="sum")
        summed, tokens = summed + float(each), tokens + int((learned != -100).sum())
    assert plain[0]["best_eval_loss"] == pytest.approx(summed / tokens, rel=1e-4)


def test_auto_counts_as_four_and_passes_what_fits(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train="epochs: 1")
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task.read_text().replace("batch_size: 2", "batch_size: auto"))
    spec, work = prepared(tiny_run(tmp_path, train="epochs: 1"))
    assert spec["step_rows"] == 8
    result = loop.train(spec, work)
    assert result["rows_at_once"] == 8
    assert result["steps"] == 5
    assert result["peak_bytes"] > 100_000_000
    assert run.name


def test_several_processes_are_started_through_accelerate(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    assert words(spec, 1, {})[-2:] == ["trainer.training.loop", str(spec)]
    several = words(spec, 2, {})
    assert several[:4] == [sys.executable, "-P", "-m", "accelerate.commands.launch"]
    assert several[several.index("--num_processes") + 1] == "2"
    given = words(spec, 1, {"HOMESTILL_LAUNCH": "--num_machines 2 --machine_rank 1 --num_processes 8"})
    assert given.count("--num_machines") == 1
    assert given[-3:] == ["-m", "trainer.training.loop", str(spec)]
    assert environment({"CUDA_VISIBLE_DEVICES": "2,3"}, 1)["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment({"CUDA_VISIBLE_DEVICES": "2,3"}, "auto")["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in environment({}, 2)
    assert processes(3, {}) == 3


def test_of_several_processes_that_failed_the_error_is_said_and_not_their_list() -> None:
    summary = (
        "W1121 09:02:08.451000 15663 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 1\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n========\n"
    )
    assert (
        reason(f"loading\nRuntimeError: the weights are short\n{summary}")
        == "RuntimeError: the weights are short"
    )
    assert reason("KeyError: 'base'\n\n") == "KeyError: 'base'"


def test_joining_a_training_that_is_over_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert join(tmp_path, {LAUNCH: "--num_machines 2"}) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_what_one_learns(
    plain: tuple[dict[str, Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(tmp_path, train=f"{RECIPE}, processes: 2", environment=ONE_THREAD)
    train.run(run)
    assert_alike(run.stage("train"), plain[1])
    assert re.search(
        r"memory: 0\.\d\d GB at most, 0\.\d\d GB expected; time: \d+ s, \d+ s expected", caplog.text
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_learn_what_one_learns(plain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """The second one is there first, and waits until the first one's training begins."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    first, second = (ONE_THREAD | {LAUNCH: f"{both} --machine_rank {rank}"} for rank in (0, 1))
    run = tiny_run(tmp_path, train=RECIPE, environment=first)
    joining = process.module("trainer.training.launch", run.stage("train"))
    with subprocess.Popen(joining, env=second, cwd=ROOT) as joined:
        train.run(run)
        assert joined.wait() == 0
    assert_alike(run.stage("train"), plain[1])


def assert_alike(folder: Path, work: Path) -> None:
    """Two processes learned in a train stage what one learned in the work folder, to the rounding of sums."""
    summary = read_json(folder / "summary.json")
    assert (summary["processes"], summary["steps"]) == (2, 9)
    several, alone = curve(folder / "work"), curve(work)
    assert [step for step, _ in several] == [step for step, _ in alone]
    assert [loss for _, loss in several] == pytest.approx([loss for _, loss in alone], rel=1e-4)
    one, other = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, work))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)


REALLY_SCARCE = """
import json, pathlib, resource, sys
from tests.trainer.training.support import prepared
from tests.tiny_run import tiny_run
from trainer.training import loop

def limit(rows, seen=[]):
    print("rows", rows, flush=True)
    if not seen:  # from now on the process may grow by 100 MB
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 100_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        seen.append(most)

spec, work = prepared(tiny_run(pathlib.Path(sys.argv[1])))
print("result", json.dumps(loop.train(spec, work, limit)))
"""


@pytest.mark.slow
def test_memory_that_really_runs_out_on_a_cpu(tmp_path: Path) -> None:
    """The step takes eight rows of 1,500 tokens at once; they need more than the 100 MB that are allowed, two do not."""
    run = tiny_run(tmp_path, train="epochs: 1, eval_steps: 9, learning_rate: 0.01")
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task.read_text().replace("accumulation: 2", "accumulation: 4"))
    curated = run.folder / "curate" / "train.jsonl"
    lines = [row for row in read_jsonl(curated) if row["example"] in [f"e{number}" for number in range(10)]]
    for number, line in enumerate(lines):  # nothing in common, so that every row is computed whole
        line["messages"] = [{"role": "user", "content": f"{number} " + "again and again " * 240}]
    write_jsonl(curated, lines)
    done = process.run(
        [sys.executable, "-c", REALLY_SCARCE, tmp_path],
        timeout=250,
        environment={**os.environ, **ONE_THREAD},
        folder=ROOT,
    )
    assert done.code == 0, done.output
    passed = [int(line.split()[1]) for line in done.output.splitlines() if line.startswith("rows ")]
    assert passed[0] == 8
    assert "out of memory with 8 rows at once: the step begins again with 4" in done.output
    assert json.loads(done.last_line.removeprefix("result "))["steps"] == 3
