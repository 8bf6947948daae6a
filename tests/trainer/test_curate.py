"""Curation: what is kept, what is dropped and why, and when it stops."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import row, write_task
from trainer import curate, pipeline, task
from trainer.data import Example
from trainer.errors import CurateError
from trainer.runs import Home, Run, read_json, read_jsonl, write_json
from trainer.settings import CurateSettings
from trainer.traces import Answer, Store


def answer(example: str, completion: str = "[[ ## label ## ]]\neven", **changes: Any) -> Answer:
    call = {
        "predictor": "sort",
        "messages": [{"role": "user", "content": f" about {example} "}],
        "completion": completion,
        "finish_reason": "stop",
    }
    plain = Answer(
        system="s", example=example, role="teacher", task="words", outputs={"label": "even"}, score=1.0,
        latency_ms=1, prompt_tokens=1, completion_tokens=1, cost_usd=0, error=None, calls=[call], strict_score=1.0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer("a"), None),
        (answer("a", error="ParseError: x", calls=[]), "could not be read"),
        (answer("a", strict_score=0.5), "score below 1"),
        (answer("a", completion=""), "shorter than 1"),
        (answer("a", completion="x" * 50), "longer than 40"),
        (answer("a", completion="one two three four " * 2), "repeats itself"),
    ],
)
def test_filters_name_their_reason(given: Answer, reason: str | None) -> None:
    settings = CurateSettings(max_chars=40, max_repetition=0.15)
    found = curate.rejected(given, 1.0, settings)
    assert found is None if reason is None else reason in str(found)


def test_a_completion_cut_off_is_not_learned() -> None:
    cut = answer("a")
    cut.calls[0]["finish_reason"] = "length"
    assert "cut off" in str(curate.rejected(cut, 1.0, CurateSettings()))


def test_balance_cuts_the_largest_class_alone() -> None:
    labels = ["a"] * 10 + ["b"] * 3 + ["c"] * 2
    examples = [Example(str(number), {}) for number in range(len(labels))]
    answers = {
        str(number): answer(str(number), outputs={"label": label}) for number, label in enumerate(labels)
    }
    kept = curate.balance(examples, answers, "label")
    assert [labels[int(example.id)] for example in kept] == ["a"] * 6 + ["b"] * 3 + ["c"] * 2
    assert curate.balance(examples, answers, None) == examples
    with pytest.raises(CurateError, match="no output of the program"):
        curate.balance(examples, answers, "nothing")


def captured(tmp_path: Path, rows: int = 240, wrong: int = 0, force: bool = False, **settings: Any) -> Run:
    """A run whose capture is done: the first `wrong` answers do not pass the metric."""
    folder = write_task(tmp_path / "words", rows=rows, **settings)
    home = Home(tmp_path / "home")
    home.root.mkdir()
    store = Store.open(home.database_url)
    run = pipeline.open_run(task.load(folder), home, store, os.environ, force=force)
    for number, example in enumerate(task.examples(run.task)):
        score = 0.0 if number < wrong else 1.0
        store.add_answer(answer(example.id, score=score, strict_score=score))
    write_json(run.folder / "capture" / "summary.json", {"system": "s"})
    write_json(run.folder / "capture" / "program.json", {})
    return run


def test_the_three_files_and_the_table(tmp_path: Path) -> None:
    run = captured(tmp_path, wrong=10)
    curate.run(run)
    folder = run.folder / "curate"
    train, summary = read_jsonl(folder / "train.jsonl"), read_json(folder / "summary.json")
    sealed = [read_jsonl(folder / f"{name}.jsonl") for name in ("calibrate", "test")]
    ids = [{one["example"] for one in train}, *({one["id"] for one in rows} for rows in sealed)]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 240 - sum(summary["dropped"].values())
    assert summary["dropped"] == {
        "score below 1": summary["train"]["captured"] - summary["train"]["examples"]
    }
    assert train[0]["messages"][0]["content"] == train[0]["messages"][0]["content"].strip()
    assert sealed[0][0]["values"].keys() == row(0).keys()
    run.store.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rows": 240, "curate": {"min_examples": 200}}, "curate.min_examples is 200"),
        ({"rows": 40}, "the calibrate split holds"),
        ({"rows": 240, "wrong": 240}, "there is nothing good to learn"),
    ],
)
def test_it_stops_where_training_would_be_wasted(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    run = captured(tmp_path, **options)
    with pytest.raises(CurateError, match=reason):
        curate.run(run)
    assert not (run.folder / "curate" / "train.jsonl").exists()
    run.store.close()


def test_force_goes_on_and_keeps_the_warning(tmp_path: Path) -> None:
    run = captured(tmp_path, rows=40, force=True)
    curate.run(run)
    warnings = read_json(run.folder / "curate" / "summary.json")["warnings"]
    assert any("the calibrate split holds" in warning for warning in warnings)
    run.store.close()
