"""Training tasks for the base model: made-up extraction tasks in DSPy's chat format.

Every task has its own label set, fields and wording, and every message its own names and ids, so
what pays is to read the prompt and to copy from the message. The tickets example is kept out: none
of its labels is in `topics.txt`, and its set of fields is never drawn (a test checks both).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import dspy
from dspy.adapters.chat_adapter import ChatAdapter

from .messages import Message, make_message, phrases, topics

MARK = "@@MESSAGE@@"
KEPT_OUT = frozenset({"category", "priority", "entities", "summary"})
LEVELS = [
    ("low", "medium", "high"),
    ("minor", "major", "critical"),
    ("P3", "P2", "P1"),
    ("later", "soon", "now"),
    ("calm", "usual", "urgent"),
    ("small", "normal", "severe"),
    ("green", "yellow", "red"),
    ("wait", "week", "today"),
    ("relaxed", "regular", "rush"),
]
LABEL_NAMES = ["category", "topic", "area", "team", "kind", "subject", "section", "desk", "queue"]
LEVEL_NAMES = ["priority", "urgency", "severity", "importance", "level", "speed"]
LIST_NAMES = {
    "ids": "i",
    "codes": "i",
    "numbers": "i",
    "people": "p",
    "contacts": "p",
    "names": "n",
    "products": "n",
    "entities": "in",
    "mentions": "in",
    "items": "in",
    "facts": "in",
}
LIST_NOTES = {"i": "ids", "p": "people", "n": "names", "in": "names and ids"}
SUMMARY_NAMES = ["summary", "title", "headline", "gist", "remark"]
INPUT_NAMES = ["text", "text", "message", "note", "email", "request", "letter"]
PARTS = ["label", "level", "list", "summary"]

Answer = Callable[[Message], Any]


@dataclass(frozen=True)
class Output:
    """One output field: its type, its description (empty for none) and its right value."""

    kind: Any
    answer: Answer
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A signature with its fixed prompt parts: the message goes between `before` and `after`."""

    signature: type[dspy.Signature]
    topics: tuple[str, ...]
    system: str
    before: str
    after: str
    answers: dict[str, Answer] = field(repr=False)

    def answer(self, message: Message) -> str:
        """The assistant's text, as DSPy's adapter writes demonstrations."""
        values = {name: get(message) for name, get in self.answers.items()}
        return str(ChatAdapter().format_assistant_message_content(self.signature, values)).strip()


def _label(rng: random.Random, chosen: tuple[str, ...]) -> Output:
    upper = rng.random() < 0.15
    shown = {topic: topic.upper() if upper else topic for topic in chosen}
    values = [*shown.values(), *(["other"] if rng.random() < 0.4 else [])]
    return Output(Literal[tuple(values)], lambda m: shown[m.topic])


def _level(rng: random.Random) -> Output:
    names = rng.choice(LEVELS)
    shown = names if rng.random() < 0.7 else tuple(reversed(names))
    return Output(Literal[shown], lambda m: names[m.level])


def _list(rng: random.Random, name: str) -> Output:
    kinds = LIST_NAMES[name]
    note = LIST_NOTES[kinds] if rng.random() < 0.7 else ""
    return Output(list[str], lambda m: list(dict.fromkeys(v for k, v in m.found if k in kinds)), note)


def _summary(rng: random.Random) -> Output:
    styles: list[tuple[Answer, str]] = [
        (lambda m: f"{m.word.capitalize()} {m.state}", "few words"),
        (lambda m: f"{m.word}: {m.state}", "short"),
        (lambda m: f"The {m.word} {m.state}.", "one sentence"),
        (lambda m: f"{m.topic.capitalize()}: {m.word} {m.state}", "one line"),
    ]
    return Output(str, *rng.choice(styles))


def _output(rng: random.Random, part: str, chosen: tuple[str, ...]) -> tuple[str, Output]:
    """A name and an output of a part's sort."""
    if part == "label":
        return rng.choice(LABEL_NAMES), _label(rng, chosen)
    if part == "level":
        return rng.choice(LEVEL_NAMES), _level(rng)
    if part == "list":
        name = rng.choice(list(LIST_NAMES))
        return name, _list(rng, name)
    return rng.choice(SUMMARY_NAMES), _summary(rng)


def make_outputs(rng: random.Random, chosen: tuple[str, ...], all_parts: bool) -> dict[str, Output]:
    """One field or one of every part, never just the fields of the tickets example."""
    parts = PARTS if all_parts else rng.sample(PARTS, 1)
    while True:
        outputs = dict(_output(rng, part, chosen) for part in parts)
        if len(outputs) == len(parts) and outputs.keys() != KEPT_OUT:
            return outputs


def build_task(docstring: str, chosen: tuple[str, ...], given: str, outputs: dict[str, Output]) -> Task:
    """Renders the prompt with DSPy's own adapter."""
    fields: dict[str, Any] = {given: (str, dspy.InputField())}
    for name, out in outputs.items():
        fields[name] = (out.kind, dspy.OutputField(desc=out.note) if out.note else dspy.OutputField())
    signature = dspy.make_signature(fields, docstring, signature_name="Made")
    system, user = (m["content"].strip() for m in ChatAdapter().format(signature, [], {given: MARK}))
    before, after = user.split(MARK)
    return Task(signature, chosen, system, before, after, {n: o.answer for n, o in outputs.items()})


def make_task(rng: random.Random, all_parts: bool = True) -> Task:
    """A new task over 4 to 9 topics, with four output fields or one."""
    chosen = tuple(rng.sample(list(topics()), rng.randint(4, 9)))
    given = rng.choice(INPUT_NAMES)
    docstring = rng.choice(phrases()["docstring"]).replace("{x}", given)
    return build_task(docstring, chosen, given, make_outputs(rng, chosen, all_parts))


def make_short_task(rng: random.Random, size: int = 40) -> Task:
    """A task with a topic among many and two levels: what to learn labelling from, without instructions."""
    chosen = tuple(rng.sample(list(topics()), size))
    outputs = {
        "urgency": Output(Literal[LEVELS[3]], lambda m: LEVELS[3][m.level]),
        "topic": Output(Literal[chosen], lambda m: m.topic),
        "severity": Output(Literal[LEVELS[1]], lambda m: LEVELS[1][m.level]),
    }
    return build_task("Label the text.", chosen, "text", outputs)


def make_messages(rng: random.Random, task: Task, count: int) -> list[Message]:
    """Messages on the task's topics."""
    return [make_message(rng, rng.choice(task.topics)) for _ in range(count)]
