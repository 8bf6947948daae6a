"""A run of a small task over the tiny base, for the tests of single stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tiny import tiny_base
from trainer import task as tasks
from trainer.runs import Home, Run, write_jsonl
from trainer.traces import Store

INSTRUCTIONS = (
    "Your input fields are: `text` (str). Your output fields are: `label` (str). All interactions will be "
    "structured in the following way, with the appropriate values filled in."
)
TASK = """\
name: tiny
program: program.py:Tiny
metric: program.py:correct
data: data.jsonl
inputs: [text]
student:
  base: ./base
  method: {method}
  quantize: {quantize}
  train: {{batch_size: 2, accumulation: 2, {train}}}
"""


def conversations(count: int) -> list[dict[str, Any]]:
    """Lines of curate/train.jsonl: two rows an example, of two predictors."""
    labels = ["hardware", "billing"]
    return [
        {
            "example": f"e{index // 2}",
            "predictor": ("first", "second")[index % 2],
            "messages": [
                {"role": "system", "content": INSTRUCTIONS},
                {
                    "role": "user",
                    "content": f"[[ ## text ## ]]\nThe printer {index} is broken{' again' * (index % 5)}.",
                },
            ],
            "completion": f"[[ ## label ## ]]\n{labels[index % 2]}\n\n[[ ## completed ## ]]\n",
        }
        for index in range(count)
    ]


def tiny_run(
    root: Path,
    *,
    method: str = "lora",
    quantize: str = "q8_0",
    train: str = "epochs: 1, learning_rate: 0.01",
    rows: int = 40,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Run:
    """A run whose curate stage is done; what stands in `root` already is kept.

    Args:
        train: further keys of student.train, as YAML between braces.
        environment: none means an empty one: nothing of the machine that tests are run on.
        options: of `Run`.
    """
    folder = root / "task"
    if not folder.exists():
        folder.mkdir(parents=True)
        tiny_base(folder / "base")
        (folder / "program.py").write_text("Tiny = correct = None\n")
        (folder / "data.jsonl").write_text('{"text": "a", "label": "b"}\n')
        (folder / "task.yaml").write_text(TASK.format(method=method, quantize=quantize, train=train))
        (root / "run" / "curate").mkdir(parents=True)
        write_jsonl(root / "run" / "curate" / "train.jsonl", conversations(rows))
    store = Store.open("sqlite://")
    return Run(tasks.load(folder), Home(root), store, root / "run", environment or {}, **options)
