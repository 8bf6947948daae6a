"""Trains the base model on made-up tasks; each task's fixed prompt part is computed once a batch."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_origin

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from .messages import Message
from .tasks import Task, make_messages, make_short_task, make_task
from .tokenizer import undated

# Of the loss at each token, beside 1 on the answer. The prompt repeats names and labels, so guessing
# it teaches copying; its fixed parts count once a batch.
LOG = logging.getLogger("base")
VALUE = re.compile(r"(?<=\]\]\n)(.*?)(?=\n\n\[\[)", re.S)


@dataclass(frozen=True)
class Lesson:
    """A part of the training. Weights are of the loss at a token, beside 1 on the answer's other ones."""

    name: str
    steps: int
    tasks: int = 2  # a step
    each: int = 8  # messages a task
    rate: float = 3e-3
    text: float = 0.1  # the message's own words
    fixed: float = 0.1  # the prompt's fixed parts, once a task: they repeat names and labels
    label: float = 1.0  # the values of labels and levels
    listed: float = 1.0  # the values of lists
    short: bool = False  # no instructions, one fixed task: only reading and labelling


LESSONS = (
    Lesson("format", steps=900),
    Lesson("reading", steps=200, tasks=1, each=32, rate=2e-3, text=0.02, fixed=0.0, label=5.0, short=True),
    Lesson("both", steps=400, rate=2e-3, text=0.02, fixed=0.02, label=5.0),
)
COPY_STEPS = 500  # at most
EASY = 0.1  # the share of a lesson in which tasks have one field only


@dataclass(frozen=True)
class Rows:
    """One task's messages as token ids: a shared prefix and padded rest rows."""

    prefix: torch.Tensor  # (1, P)
    rest: torch.Tensor  # (B, S)
    lengths: torch.Tensor  # (B,)
    weights: torch.Tensor  # (B, S): of the loss at predicting each token
    prompts: list[list[int]]  # without the answer
    answers: list[str]


def answer_ids(
    task: Task, message: Message, ids: Callable[[str], list[int]], lesson: Lesson
) -> tuple[list[int], list[float]]:
    """The answer's tokens and their weights, by the kind of the field."""
    by_kind = {Literal: lesson.label, list: lesson.listed}
    of_field = [by_kind.get(get_origin(f.annotation), 1.0) for f in task.signature.output_fields.values()]
    tokens: list[int] = []
    weights: list[float] = []
    for place, part in enumerate(VALUE.split(task.answer(message))):  # marker, value, marker, ...
        new = ids(part)
        tokens += new
        weights += [of_field[place // 2] if place % 2 else 1.0] * len(new)
    return tokens, weights


def frame(task: Task, tokenizer: PreTrainedTokenizerFast, short: bool) -> tuple[str, str]:
    """What stands before and after a message: the chat template without its date line, as in serving."""
    user = f"{task.before}@@CUT@@" + ("" if short else task.after)
    chat = [{"role": "system", "content": "" if short else task.system}, {"role": "user", "content": user}]
    template = undated(str(tokenizer.chat_template))
    shown = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    head, tail = str(shown).split("@@CUT@@")
    return head, tail


def encode(task: Task, messages: list[Message], tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> Rows:
    """The rows of a task as tokens, padded on the right."""
    head, tail = frame(task, tokenizer, lesson.short)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    prefix = ids(head)
    rows: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    prompts: list[list[int]] = []
    for message in messages:
        prompt, own = ids(message.text + tail), len(ids(message.text)) - 1
        wanted, values = answer_ids(task, message, ids, lesson)
        fixed = 0.0 if rows else lesson.fixed
        rows.append(torch.tensor([*prompt, *wanted, tokenizer.eos_token_id]))
        weights.append(torch.tensor([lesson.text] * own + [fixed] * (len(prompt) - own) + values + [1.0]))
        prompts.append(prefix + prompt)
    rest = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(tokenizer.pad_token_id))
    weight = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
    # Few different shapes: each new one costs the CPU's matrix library a set-up.
    room = -rest.shape[1] % 16
    rest, weight = torch.nn.functional.pad(rest, (0, room)), torch.nn.functional.pad(weight, (0, room))
    lengths = torch.tensor([len(row) for row in rows])
    return Rows(torch.tensor([prefix]), rest, lengths, weight, prompts, [task.answer(m) for m in messages])


def loss_of(model: LlamaForCausalLM, rows: Rows, fixed_weight: float) -> torch.Tensor:
    """Weighted mean cross entropy; logits are made only where there is a weight."""
    count, size = rows.rest.shape[0], rows.prefix.shape[1]
    cache = DynamicCache(config=model.config)
    first = model.model(input_ids=rows.prefix, past_key_values=cache, use_cache=True).last_hidden_state
    cache.batch_repeat_interleave(count)
    real = torch.arange(rows.rest.shape[1])[None] < rows.lengths[:, None]
    mask = torch.cat([torch.ones(count, size, dtype=torch.long), real.long()], 1)
    hidden = model.model(
        input_ids=rows.rest, attention_mask=mask, past_key_values=cache, use_cache=True
    ).last_hidden_state
    weights = rows.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[:, :-1][chosen])
    losses = cross_entropy(logits, rows.rest[:, 1:][chosen], reduction="none")
    loss = (losses * weights[chosen]).sum() / weights[chosen].sum()
    if not fixed_weight:
        return loss
    return loss + fixed_weight * cross_entropy(model.lm_head(first[0, :-1]), rows.prefix[0, 1:])


def copy_loss(model: LlamaForCausalLM, words: int, make: torch.Generator) -> torch.Tensor:
    """Loss at the second half of rows that say the same random tokens twice, with a gap between."""
    ids = torch.randint(0, words, (32, 56), generator=make)
    ids[:, 32:] = ids[:, :24]
    hidden = model.model(input_ids=ids).last_hidden_state[:, 32:-1]
    return cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 33:].flatten())


def teach_copying(
    model: LlamaForCausalLM, opts: Sequence[torch.optim.Optimizer], seed: int, words: int
) -> None:
    """Copying first, over few tokens, then over all: within minutes; tasks alone take hours to teach it."""
    make = torch.Generator().manual_seed(seed)
    few, step = 256, 0
    for size, goal in ((few, 0.5), (words, 1.0)):
        loss = float("inf")
        while loss > goal and step < COPY_STEPS:
            value = copy_loss(model, size, make)
            torch.autograd.backward(value)
            loss = value.item()
            update(model, opts, LESSONS[0].rate * min(1.0, (step + 1) / 50))
            step += 1
            if step % 20 == 0:
                LOG.info("copying, step %d: loss %.3f over %d tokens", step, loss, size)


@torch.no_grad()
def right_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, tasks: int = 50
) -> tuple[float, int]:
    """Share of whole answers that greedy decoding gets exactly right, and how many were asked for."""
    model.eval()
    rng, right, total = random.Random(seed), 0, 0
    for _ in range(tasks):
        task = make_task(rng)
        rows = encode(task, make_messages(rng, task, 4), tokenizer, LESSONS[-1])
        for prompt, answer in zip(rows.prompts, rows.answers, strict=True):
            given = torch.tensor([prompt])
            made = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=120, do_sample=False
            )
            right += tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True) == answer
            total += 1
    return right / total, total


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns from fewer steps than AdamW; AdamW for the rest."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def update(model: LlamaForCausalLM, opts: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """One step of all optimizers."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = rate
        opt.step()
        opt.zero_grad(set_to_none=True)


def share_of_rate(done: float) -> float:
    """Steady, then falling to zero over the last half; `done` is the share of the steps."""
    return min(1.0, max(2 * (1 - done), 0.02))


def teach(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lesson: Lesson,
    rng: random.Random,
    opts: Sequence[torch.optim.Optimizer],
) -> Iterator[tuple[int, float]]:
    """One lesson; yields each step's number and loss."""
    model.train()
    simple = make_short_task(rng)
    for step in range(1, lesson.steps + 1):
        done, total = step / lesson.steps, 0.0
        for _ in range(lesson.tasks):
            task = simple if lesson.short else make_task(rng, all_parts=done >= EASY)
            rows = encode(task, make_messages(rng, task, lesson.each), tokenizer, lesson)
            loss = loss_of(model, rows, lesson.fixed)
            torch.autograd.backward(loss / lesson.tasks)
            total += loss.item() / lesson.tasks
        update(model, opts, lesson.rate * share_of_rate(done))
        yield step, total


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    lessons: Sequence[Lesson],
    keep: Callable[[dict[str, object]], None],
) -> None:
    """Copying, then the lessons; calls `keep` with step and loss every 20 steps and after each lesson."""
    start = time.monotonic()
    teach_copying(model, optimizers(model, LESSONS[0].rate), seed, len(tokenizer))
    for number, lesson in enumerate(lessons):
        rng, opts = random.Random(f"{seed} {number}"), optimizers(model, lesson.rate)
        for step, loss in teach(model, tokenizer, lesson, rng, opts):
            if step % 20 == 0 or step == lesson.steps:
                seconds = round(time.monotonic() - start)
                keep({"lesson": lesson.name, "step": step, "seconds": seconds, "loss": round(loss, 4)})
