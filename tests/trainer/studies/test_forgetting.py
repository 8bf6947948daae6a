"""The same answers before and after, token by token; the interval is over whole conversations."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import tiny_run
from tests.trainer.families import encoder_decoders
from trainer.errors import DataError, EvaluateError
from trainer.runs import Run
from trainer.studies import forgetting
from trainer.studies.forgetting import Judge, Judged
from trainer.studies.study import Study


def general(root: Path, count: int = 6, words: int = 1) -> Path:
    file = root / "general.jsonl"
    rows: list[dict[str, Any]] = [
        {"question": f"What is {number}?", "answer": f"The number {number}." * words}
        for number in range(count - 1)
    ]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "The printer?"},
                {"role": "assistant", "content": "It is broken."},
            ]
        }
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose training changed a single file, so that before and after differ in name only."""
    made = tiny_run(tmp_path)
    shutil.copytree(made.task.folder / "base", made.folder / "train" / "model")
    (made.folder / "train" / "model" / "generation_config.json").write_text("{}", encoding="utf-8")
    return made


def study_of(run: Run, root: Path) -> Study:
    return Study("forgetting", run, root / "study")


def pretend(before: float, after: float, asked: list[str]) -> Callable[[Path], Judge]:
    """Models with these losses per token; the one after is right on half of the tokens."""

    def load(folder: Path) -> Judge:
        trained = folder.name == "model"

        def judge(ids: list[int], labels: list[int]) -> Judged:
            asked.append(folder.name)
            tokens = sum(label >= 0 for label in labels)
            return Judged(tokens, tokens * (after if trained else before), tokens // 2 if trained else tokens)

        return judge

    return load


def test_the_drop_is_measured_over_the_tokens(run: Run, tmp_path: Path) -> None:
    outcome = forgetting.run(
        study_of(run, tmp_path), forgetting.read(general(tmp_path)), pretend(1.0, 1.5, []), name="mine.jsonl"
    )
    figures = outcome.figures
    assert figures["conversations"] == 6
    assert figures["score"]["before"]["mean"] == 1.0
    assert figures["loss"]["after"]["mean"] == pytest.approx(1.5)
    assert figures["loss_rise"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert 0.4 < figures["drop"]["low"] <= figures["drop"]["mean"] <= figures["drop"]["high"] < 0.7
    assert outcome.finding.endswith("it has forgotten.")
    assert f"{math.e:.2f}" in outcome.table.rows[0]
    assert outcome.notes[0].startswith("6 conversations of mine.jsonl")
    assert len(outcome.pictures) == 2


@pytest.mark.parametrize(
    ("first", "loss", "finding"),
    [
        (
            2,
            1.5,
            "from 10.0 to 20.0, its loss per token from 1.000 to 1.500: one got better, the other worse, so",
        ),
        (2, 0.5, "from 10.0 to 20.0, its loss per token from 1.000 to 0.500: it has gained."),
        (1, 0.5, "from 10.0 to 10.0, its loss per token from 1.000 to 0.500: it has gained."),
        (1, 1.0, "from 10.0 to 10.0, its loss per token from 1.000 to 1.000: no more than chance may show."),
        (0, 1.0, "from 10.0 to 0.0, its loss per token from 1.000 to 1.000: it has forgotten."),
    ],
)
def test_the_finding_cannot_contradict_the_table(first: int, loss: float, finding: str) -> None:
    before, after = [Judged(10, 10.0, 1)] * 4, [Judged(10, 10 * loss, first)] * 4
    outcome = forgetting.outcome({"before": before, "after": after}, 0, 0, "mine.jsonl")
    assert finding in outcome.finding


def test_nothing_is_judged_twice(run: Run, tmp_path: Path) -> None:
    rows = forgetting.read(general(tmp_path))
    first: list[str] = []
    outcome = forgetting.run(study_of(run, tmp_path), rows, pretend(1.0, 1.5, first))
    assert (first.count("base"), first.count("model")) == (6, 6)
    again: list[str] = []
    assert forgetting.open_rows(study_of(run, tmp_path), rows) == 0
    assert forgetting.run(study_of(run, tmp_path), rows, pretend(9.0, 9.0, again)) == outcome
    assert not again


def test_equal_weights_have_forgotten_nothing(run: Run, tmp_path: Path) -> None:
    outcome = forgetting.run(study_of(run, tmp_path), forgetting.read(general(tmp_path)))
    figures = outcome.figures
    assert figures["drop"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert figures["loss_rise"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert 3 < figures["loss"]["before"]["mean"] < 12  # of a random model over 512 tokens
    assert "chance" in outcome.finding


def test_the_loss_is_that_of_the_training_library(run: Run, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = forgetting.folders(run)["before"]
    ids = [5, 6, 7, 8, 9, 10]
    labels = [-100, -100, -100, 8, 9, 10]
    judged = forgetting.load_weights(folder)(ids, labels)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert judged.tokens == 3
    assert judged.loss / 3 == pytest.approx(theirs.item(), rel=1e-5)


def test_an_encoder_decoder_is_judged_by_its_decoder(tmp_path: Path) -> None:
    import torch
    from transformers import T5ForConditionalGeneration

    folder = encoder_decoders.write(encoder_decoders.FLAN, tmp_path / "base")
    judged = forgetting.load_weights(folder)([5, 6, 1, 8, 9, 1], [-100, -100, -100, 8, 9, 1])
    model: Any = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = model(input_ids=torch.tensor([[5, 6, 1]]), labels=torch.tensor([[8, 9, 1]])).loss
    assert judged.tokens == 3
    assert judged.loss / 3 == pytest.approx(theirs.item(), rel=1e-5)


def test_soft_caps_are_computed_as_in_training(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    # so small a cap that leaving it out shows
    torch.manual_seed(0)
    config: Any = Gemma2Config(**size, **heads, attn_logit_softcapping=0.01, initializer_range=2.0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ids, labels = [3, 4, 5, 6, 7], [-100, -100, 5, 6, 7]
    capped: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.inference_mode():
        loss = capped(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert forgetting.load_weights(tmp_path)(ids, labels).loss == pytest.approx(3 * float(loss), rel=1e-5)


def test_what_does_not_fit_is_left_out_and_counted(run: Run, tmp_path: Path) -> None:
    long = forgetting.read(general(tmp_path, count=2, words=600))[:1]
    rows = [*forgetting.read(general(tmp_path)), *long]
    outcome = forgetting.run(study_of(run, tmp_path), rows, pretend(1.0, 1.5, []))
    assert outcome.figures["too_long"] == 1
    assert "1 left out" in outcome.notes[0]
    with pytest.raises(EvaluateError, match="none of 1 conversations"):
        forgetting.run(study_of(run, tmp_path), long, pretend(1.0, 1.5, []))


def test_every_bad_row_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    lines = [
        "{",
        "[]",
        '{"question": "a"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        "",
        '{"x": 1}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        forgetting.read(file)
    assert [fault.partition(": ")[0] for fault in caught.value.faults[1:]] == [
        f"bad.jsonl:{line}" for line in (1, 2, 3, 4, 6)
    ]
    with pytest.raises(DataError, match="cannot be read"):
        forgetting.read(tmp_path / "none.jsonl")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows"):
        forgetting.read(file)
