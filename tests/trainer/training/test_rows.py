"""General data is mixed in at its share, the same lines every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_tokenizer
from tests.tiny_run import conversations, tiny_run
from trainer import prepare, task, train
from trainer.errors import TaskError
from trainer.runs import write_jsonl
from trainer.settings import TrainSettings
from trainer.template import IGNORED, Template
from trainer.training import rows


def general(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"It is {n}."},
            ]
        }
        for n in range(count)
    ]


def mixed(folder: Path, share: float, count: int = 40, **settings: Any) -> rows.Rows:
    """40 rows of the task, some of `count` general ones mixed in."""
    tokenizer = tiny_tokenizer()
    template = Template.freeze(tokenizer)
    write_jsonl(folder / "general.jsonl", general(count))
    recipe = TrainSettings.model_validate({"replay": {"data": "general.jsonl", "share": share}, **settings})
    own = rows.tokenize(conversations(40), tokenizer, template, recipe, seed=3)
    return rows.with_replay(own, folder / "general.jsonl", tokenizer, template, settings=recipe, seed=3)


def held(sizes: list[int], seed: int) -> tuple[set[int], int]:
    """Which examples of so many rows are held back, and how many rows."""
    tokenizer = tiny_tokenizer()
    made = [
        {
            "example": f"e{at}",
            "messages": [{"role": "user", "content": f"question {at}"}],
            "completion": f"answer {row}",
        }
        for at, size in enumerate(sizes)
        for row in range(size)
    ]
    found = rows.tokenize(made, tokenizer, Template.freeze(tokenizer), TrainSettings(), seed)
    texts = [tokenizer.decode(row["input_ids"]) for row in found.evaluate]
    assert len(found.train) == sum(sizes) - len(texts)
    return {at for at in range(len(sizes)) if any(f"question {at}<" in text for text in texts)}, len(texts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("sizes", "most"),
    [([9] + [1] * 9, 1), ([100, 1], 1), ([100, 1, 1], 1), ([10] * 6 + [1] * 60, 7), ([100, 100, 1], 1)],
)
def test_an_example_with_many_rows_is_trained_on(sizes: list[int], most: int, seed: int) -> None:
    """A second predictor that is asked the same again and again would never have been trained."""
    examples, count = held(sizes, seed)
    assert 1 <= count <= most
    assert all(sizes[at] == 1 for at in examples)


@pytest.mark.parametrize(
    ("sizes", "expected"), [([1] * 40, 4), ([2] * 25, 2), ([3] * 4, 1), ([2] * 4 + [1], 1)]
)
def test_of_examples_of_like_size_the_share_is_held_back(sizes: list[int], expected: int) -> None:
    assert len(held(sizes, 3)[0]) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.2, 9), (0.5, 36), (0.01, 0)])
def test_the_share_is_that_of_all_rows(tmp_path: Path, share: float, expected: int) -> None:
    found = mixed(tmp_path, share)
    assert found.replayed == expected
    assert len(found.train) == 36 + expected
    assert len(found.evaluate) == 4
    assert mixed(tmp_path, share) == found


def test_what_there_is_is_taken_and_only_the_answer_is_learned(tmp_path: Path) -> None:
    found = mixed(tmp_path, 0.5, count=5)
    assert found.replayed == 5
    tokenizer = tiny_tokenizer()
    learned = [
        tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in found.train[-5:]
    ]
    assert sorted(learned) == [f"It is {n}.<|eot_id|>" for n in range(5)]


def test_long_general_rows_are_passed_over(tmp_path: Path) -> None:
    assert mixed(tmp_path, 0.2, max_length=400).replayed == 9
    write_jsonl(tmp_path / "long.jsonl", general(1))
    long = [{"messages": [{"role": "user", "content": "long " * 400}, {"role": "assistant", "content": "a"}]}]
    write_jsonl(tmp_path / "general.jsonl", long * 40)
    tokenizer = tiny_tokenizer()
    template = Template.freeze(tokenizer)
    recipe = TrainSettings.model_validate({"replay": {"data": "x"}, "max_length": 400})
    own = rows.tokenize(conversations(40), tokenizer, template, recipe, seed=3)
    file = tmp_path / "general.jsonl"
    assert rows.with_replay(own, file, tokenizer, template, settings=recipe, seed=3).replayed == 0


def test_the_stage_depends_on_the_file_and_counts_what_was_mixed_in(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    file = run.task.folder / "task.yaml"
    text = file.read_text()
    file.write_text(text.replace("epochs: 1", "replay: {data: general.jsonl, share: 0.25}, epochs: 1"))
    with pytest.raises(
        TaskError, match=r"student.train.replay.data is 'general.jsonl', which does not exist.*:10"
    ):
        task.load(run.task.folder)
    write_jsonl(run.task.folder / "general.jsonl", general(40))
    run = tiny_run(tmp_path)
    before = train.inputs(run)
    (run.stage("train") / "work").mkdir()
    about, spec, _ = prepare.prepare(run, {})
    assert (about["rows"], about["replayed_rows"]) == (48, 12)
    assert spec["steps"] == 12
    write_jsonl(run.task.folder / "general.jsonl", general(41))
    assert train.inputs(run) != before
