"""The tickets example: its data, metric and the text that its base model was trained on."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

dspy = pytest.importorskip("dspy")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/tickets"


def load(name: str, path: Path) -> ModuleType:
    """A module from a file outside any package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


generate = load("tickets_generate", FOLDER / "generate.py")
program = load("tickets_program", FOLDER / "program.py")
TASK = yaml.safe_load((FOLDER / "task.yaml").read_text())


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / TASK["data"][split]).read_text("utf-8").splitlines()]


SPLITS = {split: rows(split) for split in ("train", "calibrate", "test")}
FIELDS = program.Ticket.output_fields


def test_generator_writes_the_committed_files() -> None:
    for split, tickets in generate.make_all().items():
        assert generate.as_lines(tickets) == (FOLDER / TASK["data"][split]).read_text("utf-8")


def test_splits_are_large_enough_and_share_no_ticket() -> None:
    assert {split: len(found) for split, found in SPLITS.items()} == {
        k: sum(v) for k, v in generate.SIZES.items()
    }
    texts = [row["text"] for split in SPLITS.values() for row in split]
    assert len(set(texts)) == len(texts) <= 1500


def test_unseen_kinds_are_absent_from_train_only() -> None:
    others = {split: sum(row["category"] == "other" for row in found) for split, found in SPLITS.items()}
    assert others == {split: unseen for split, (_, unseen) in generate.SIZES.items()}
    assert others["train"] == 0


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answer_is_valid_and_passes_the_metric(split: str) -> None:
    for row in SPLITS[split]:
        answer = dspy.ChatAdapter().format_assistant_message_content(program.Ticket, row)
        parsed = dspy.ChatAdapter().parse(program.Ticket, answer)
        assert program.correct(dspy.Example(**row), dspy.Prediction(**parsed), trace=[])
        assert all(entity in row["text"] for entity in row["entities"])


def test_metric_tells_wrong_from_right() -> None:
    gold = {"category": "billing", "priority": "low", "entities": ["Acorn", "#1"], "summary": "x"}

    def score(trace: Any = None, **changes: Any) -> bool:
        return bool(program.correct(dspy.Example(**gold), dspy.Prediction(**gold | changes), trace))

    assert score(entities=["acorn "])
    assert not score(entities=["acorn"], trace=[])
    assert not score(summary=" ", trace=[])
    assert not score(category="other")
    assert not score(priority="urgent")
    assert not score(entities=["Acorn", "#2", "#3"])


def test_base_was_trained_on_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from base.messages import topics  # type: ignore[import-not-found, unused-ignore]
    from base.tasks import make_task  # type: ignore[import-not-found, unused-ignore]

    labels = set(FIELDS["category"].annotation.__args__) - {"other"}
    assert not labels & topics().keys()
    for seed in range(300):
        task = make_task(random.Random(seed))
        assert task.answers.keys() != FIELDS.keys()
