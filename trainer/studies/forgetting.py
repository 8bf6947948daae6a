"""What fine-tuning cost in general ability: the same general answers, before and after.

Every reference answer of a general set is put to both models token by token, as in training: how likely
was it (loss), and how often was its next token the model's first choice (score). The 16-bit weights are
measured, before quantisation, so that the difference is what training did and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.conversion import families
from trainer.errors import EvaluateError
from trainer.progress import progress
from trainer.runs import Run
from trainer.statistics.scores import RESAMPLES, Interval
from trainer.studies import pictures
from trainer.studies.report import Outcome, Picture, Table, percent, points
from trainer.studies.rows import Row
from trainer.studies.study import Study
from trainer.template import IGNORED, Template
from trainer.training import base as bases
from trainer.training import chats

VERSION = 2
"""Raise it when rows that were stored before no longer mean the same."""
Which = Literal["before", "after"]
MODELS: tuple[Which, Which] = ("before", "after")
SHOWN = 500
"""Conversations in the picture, drawn at random where there are more."""


@dataclass(frozen=True)
class Conversation:
    """A general question with its reference answer. The id is the hash of both."""

    id: str
    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Judged:
    """A model's opinion of one reference answer."""

    tokens: int
    loss: float
    """Sum over the tokens of −log p, in nats."""
    first: int
    """Tokens that the model itself would have said, greedily."""


Judge = Callable[[list[int], list[int]], Judged]
"""Judges one tokenized conversation: ids and labels [n], labels of the prompt ignored."""
Load = Callable[[Path], Judge]


def read(file: Path) -> list[Conversation]:
    """A general set without its repetitions.

    Raises:
        DataError: with every bad row's line.
    """
    rows = [_conversation(messages) for messages in chats.read(file)]
    return list({row.id: row for row in rows}.values())


def folders(run: Run) -> dict[Which, Path]:
    """The 16-bit weights before and after.

    Raises:
        TrainError: the base is not here.
    """
    return {"before": bases.resolve(run), "after": run.folder / "train" / "model"}


def identity(folder: Path, max_length: int) -> str:
    """Hash of everything that decides a model's rows."""
    text = json.dumps([VERSION, bases.sha256(folder), max_length])
    return hashlib.sha256(text.encode()).hexdigest()


def open_rows(study: Study, general: Sequence[Conversation]) -> int:
    """How many conversations are still to be judged, by both models together."""
    rows = study.rows
    return sum(
        row.id not in known
        for known in (rows.of(system) for system in _systems(study).values())
        for row in general
    )


def run(
    study: Study, general: Sequence[Conversation], load: Load | None = None, *, name: str = "the general set"
) -> Outcome:
    """Judge the general set with base and student.

    Args:
        name: what the report calls the set.
        load: loads the weights of a folder; by default in this process, on the GPU where there is one.

    Raises:
        EvaluateError: no conversation fits.
    """
    where, systems, rows = folders(study.run), _systems(study), study.rows
    encoded = _encoded(general, where, _max_length(study))
    names = list(encoded["before"])
    missing = {model: [one for one in names if one not in rows.of(systems[model])] for model in MODELS}
    left = sum(map(len, missing.values()))
    with progress(f"study {study.name}", 2 * len(names), 2 * len(names) - left) as advance:
        for model in MODELS:
            judge = (load or load_weights)(where[model]) if missing[model] else None
            for one in missing[model]:
                assert judge is not None
                judged = asdict(judge(*encoded[model][one]))
                rows.add({"system": systems[model], "example": one, "model": model, **judged})
                advance(1, model)
    return outcome(
        {model: _judged(rows.of(systems[model]), names) for model in MODELS},
        len(general) - len(names),
        study.seed,
        name,
    )


def load_weights(folder: Path) -> Judge:
    """The weights of a folder in the Hugging Face layout, in memory."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # the study shows its own
    cuda = torch.cuda.is_available()
    # on a CPU the 16-bit values are computed with in 32 bits, which is faster there and never less exact
    dtype: Any = "auto" if cuda else torch.float32
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: Any = families.auto_class(config.model_type).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=families.attention(config.model_type),
        local_files_only=True,
    )
    model = model.to("cuda" if cuda else "cpu").eval()

    def judge(ids: list[int], labels: list[int]) -> Judged:
        at = [place for place, label in enumerate(labels) if label != IGNORED]
        wanted = torch.tensor([labels[place] for place in at], device=model.device)
        with torch.inference_mode():
            if model.config.is_encoder_decoder:
                prompt = torch.tensor([ids[: at[0]]], device=model.device)
                before = model.prepare_decoder_input_ids_from_labels(wanted[None])
                seen = model(input_ids=prompt, decoder_input_ids=before).logits[0].float()
            else:
                logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
                seen = logits[[place - 1 for place in at]].float()
        loss = torch.nn.functional.cross_entropy(seen, wanted, reduction="sum")
        return Judged(len(at), float(loss), int((seen.argmax(-1) == wanted).sum()))

    return judge


def outcome(judged: dict[Which, list[Judged]], too_long: int, seed: int, name: str) -> Outcome:
    """The table, from both models' rows on the same conversations in one order."""
    tokens = np.array([row.tokens for row in judged["before"]], dtype=float)
    loss = {model: np.array([row.loss for row in judged[model]]) for model in MODELS}
    first = {model: np.array([row.first for row in judged[model]], dtype=float) for model in MODELS}
    score = {model: per_token(first[model], tokens, seed) for model in MODELS}
    losses = {model: per_token(loss[model], tokens, seed) for model in MODELS}
    drop = per_token(first["before"] - first["after"], tokens, seed)
    rise = per_token(loss["after"] - loss["before"], tokens, seed)
    rows = [
        [model, *percent(score[model]), *_nats(losses[model]), f"{np.exp(losses[model].mean):.2f}"]
        for model in MODELS
    ]
    rows.append(["drop", points(drop), "", f"{rise.mean:+.3f}", f"{rise.low:+.3f} to {rise.high:+.3f}", ""])
    picture = pictures.intervals(
        "Next-token score on the general set",
        ["before", "after"],
        [pictures.Series("score", [score["before"], score["after"]])],
    )
    return Outcome(
        title="General ability before and after fine-tuning",
        finding=_sentence(score, losses, [drop, rise]),
        table=Table(
            ("Model", "Next-token score", "95 % interval", "Loss per token", "95 % interval", "Perplexity"),
            rows,
        ),
        meaning=_meaning(),
        pictures=[
            Picture(picture, "Share of the reference answers' tokens that the model itself would have said."),
            Picture(
                _spread(loss, tokens, seed),
                f"Loss per token of {'each conversation' if len(tokens) <= SHOWN else f'{SHOWN} conversations'}; "
                "above the line it rose. A cloud above it: forgotten throughout; single points: in places.",
            ),
        ],
        notes=[
            f"{len(tokens):,} conversations of {name}, {int(tokens.sum()):,} answer tokens"
            + (f"; {too_long} left out as longer than student.train.max_length." if too_long else ".")
        ],
        figures={
            "conversations": len(tokens),
            "tokens": int(tokens.sum()),
            "too_long": too_long,
            "score": {model: asdict(score[model]) for model in MODELS},
            "loss": {model: asdict(losses[model]) for model in MODELS},
            "drop": asdict(drop),
            "loss_rise": asdict(rise),
        },
    )


def per_token(values: Any, tokens: Any, seed: int, confidence: float = 0.95) -> Interval:
    """Sum of `values` over sum of `tokens`, both [conversations], with a bootstrap over whole conversations."""
    mean = float(values.sum() / tokens.sum())
    if len(tokens) < 2:
        return Interval(mean, mean, mean)
    drawn = np.random.default_rng(seed).integers(0, len(tokens), (RESAMPLES, len(tokens)))
    ratios = values[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def _conversation(messages: chats.Messages) -> Conversation:
    name = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]
    return Conversation(name, messages[:-1], messages[-1]["content"].strip())


def _encoded(
    general: Sequence[Conversation], where: dict[Which, Path], most: int
) -> dict[Which, dict[str, tuple[list[int], list[int]]]]:
    """Ids and labels for each model, by its own tokenizer and template, of what fits into both."""
    from transformers import AutoTokenizer

    encoded: dict[Which, dict[str, tuple[list[int], list[int]]]] = {}
    for model, folder in where.items():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        template = Template.freeze(tokenizer)
        encoded[model] = {row.id: template.encode(tokenizer, row.messages, row.answer) for row in general}
    fitting = [row.id for row in general if all(len(encoded[model][row.id][0]) <= most for model in where)]
    if not fitting:
        raise EvaluateError(
            f"none of {len(general)} conversations fits into student.train.max_length, {most} tokens; "
            "give a general set of shorter ones"
        )
    return {model: {name: pairs[name] for name in fitting} for model, pairs in encoded.items()}


def _systems(study: Study) -> dict[Which, str]:
    return {model: identity(folder, _max_length(study)) for model, folder in folders(study.run).items()}


def _judged(rows: dict[str, Row], names: Sequence[str]) -> list[Judged]:
    return [Judged(rows[name]["tokens"], rows[name]["loss"], rows[name]["first"]) for name in names]


def _max_length(study: Study) -> int:
    return study.run.task.settings.student.train.max_length


def _sentence(
    score: Mapping[Which, Interval], losses: Mapping[Which, Interval], worse: list[Interval]
) -> str:
    """Both measures and a verdict that neither contradicts.

    Args:
        worse: by how much each measure got worse.
    """
    lost, gained = any(by.low > 0 for by in worse), any(by.high < 0 for by in worse)
    verdict = {
        (True, False): "it has forgotten",
        (False, True): "it has gained",
        (False, False): "no more than chance may show",
        (True, True): "one got better, the other worse, so neither alone says what was lost",
    }[lost, gained]
    scores, nats = (
        " to ".join(show(measure[model])[0] for model in MODELS)
        for measure, show in ((score, percent), (losses, _nats))
    )
    return f"The model's next-token score went from {scores}, its loss per token from {nats}: {verdict}."


def _spread(loss: dict[Which, Any], tokens: Any, seed: int) -> str:
    """Each conversation's loss per token, before and after."""
    shown = np.random.default_rng(seed).permutation(len(tokens))[:SHOWN]
    before, after = ((loss[model] / tokens)[shown] for model in MODELS)
    return pictures.pairs("Loss per token of the same conversations", before, after, MODELS)


def _nats(interval: Interval) -> tuple[str, str]:
    return f"{interval.mean:.3f}", f"{interval.low:.3f}–{interval.high:.3f}"


def _meaning() -> dict[str, str]:
    return {
        "before": "The base's 16-bit weights.",
        "after": "The student's merged 16-bit weights.",
        "Next-token score": "Share of the reference answers' tokens that the model ranks first, given the question and "
        "the answer up to there.",
        "Loss per token": "Mean −log p of the reference answers' tokens, in nats; perplexity is e to its power.",
        "drop": "Before − after of the score, in points, and after − before of the loss. Both models judge the same "
        "conversations, and the intervals resample whole conversations.",
    }
