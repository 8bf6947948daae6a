"""Methods that leave no adapter, from data to an answer: trained, merged, exported, certified equal, asked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.families import bases
from tests.trainer.families.stages import curated, messages
from tests.trainer.training.support import ONE_THREAD
from trainer import export, register, task, train
from trainer.errors import ExportError
from trainer.runs import read_json
from trainer.runtimes.choice import EmbeddedRuntime
from trainer.runtimes.local import Chat, recorded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("full", {"learning_rate": 0.003}), ("prompt", {"learning_rate": 0.05, "prompt_tokens": 6})],
)
def test_from_data_to_an_answer(tmp_path: Path, method: str, recipe: dict[str, Any]) -> None:
    try:
        export.converter({})
    except ExportError as error:
        pytest.skip(str(error))
    run = curated(tmp_path, partial(bases.write, "llama-3"))
    file = run.task.folder / "task.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["student"] |= {"method": method, "train": settings["student"]["train"] | recipe}
    file.write_text(yaml.safe_dump(settings))
    run = replace(run, task=task.load(run.task.folder), environment=ONE_THREAD)
    train.run(run)
    assert not (run.stage("train") / "adapter").exists()
    export.run(run)
    register.run(run)
    parity = read_json(run.stage("register") / "parity.json")
    assert parity["fault"] is None
    assert parity["prompt_tokens_equal"] is True
    assert parity["evidence"]["answers"]["n"] == 6
    assert parity["answers_equal"] >= 0.8, parity["evidence"]  # 8 bits may turn a near tie
    written = recorded(run.folder)["model"]
    with EmbeddedRuntime().serving(written) as endpoint:
        reply = Chat().ask(endpoint, messages(40), max_tokens=40)
    assert reply.complete
    assert "soft_" not in reply.text
    assert reply.text.strip()
