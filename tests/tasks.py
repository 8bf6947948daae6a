"""A small task folder for tests: its files, and a way to change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

PROGRAM = '''
from typing import Literal

import dspy


class Sort(dspy.Signature):
    """Sort the word."""

    text: str = dspy.InputField()
    label: Literal["even", "odd"] = dspy.OutputField()


class Sorter(dspy.Module):
    def __init__(self):
        super().__init__()
        self.sort = dspy.Predict(Sort)

    def forward(self, text):
        return self.sort(text=text)


def correct(example, prediction, trace=None):
    return prediction.label == example.label


def graded(example, prediction, trace=None):
    return 0.75 if prediction.label == example.label else 0.25
'''

SETTINGS: dict[str, Any] = {
    "name": "words",
    "program": "program.py:Sorter",
    "metric": "program.py:correct",
    "data": "data/*.jsonl",
    "inputs": ["text"],
    "teacher": {
        "model": "openai/pretend",
        "stand_in": True,
        "price_per_1m": {"input": 1, "output": 2},
        "concurrency": 2,
        "retries": 0,
    },
    "curate": {"min_examples": 2, "near_duplicate": 1.0},
}


def row(number: int) -> dict[str, str]:
    """The example with this number."""
    return {"text": f"word number {number}", "label": "odd" if number % 2 else "even"}


def write_task(folder: Path, rows: int = 20, **settings: Any) -> Path:
    """Write the task into `folder`; keyword arguments replace keys of its task.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "task.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}), encoding="utf-8")
    (folder / "data").mkdir(exist_ok=True)
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(rows))
    (folder / "data" / "rows.jsonl").write_text(lines, encoding="utf-8")
    return folder
