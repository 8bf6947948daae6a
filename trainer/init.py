"""`homestill init`: a task folder that runs, to be replaced piece by piece with one's own."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from trainer.errors import TaskError
from trainer.runs import write_text

ROWS = 300
THINGS = [
    "kettle", "backpack", "desk lamp", "rain jacket", "keyboard", "frying pan", "tent", "pair of headphones",
    "bicycle pump", "coffee grinder", "office chair", "water bottle", "suitcase", "toaster", "yoga mat",
]  # fmt: skip
GOOD = [
    "it has not let me down once in half a year", "setting it up took two minutes", "my whole family keeps borrowing it",
    "the finish feels far more expensive than it was", "I would buy it again tomorrow", "it does exactly what the page promised",
    "support answered within the hour", "it survived a fall down the stairs", "I stopped looking for anything better",
]  # fmt: skip
BAD = [
    "it broke on the third day", "the manual is a riddle without an answer", "nobody answered my three mails",
    "one screw was missing and another did not fit", "it smells of plastic even after a week", "the colour has nothing to do with the photo",
    "I sent it back and still wait for the money", "it is louder than my neighbour's drill", "the seam came open on its first trip",
]  # fmt: skip
OPENINGS = [
    "Bought this {thing} in {month}.",
    "A {thing} for my sister, ordered in {month}.",
    "My second {thing}.",
    "The {thing} arrived on a {day}.",
]
MONTHS = ["January", "March", "May", "July", "September", "November"]
DAYS = ["Monday", "Tuesday", "Thursday", "Saturday"]


def write_starter(folder: Path) -> list[Path]:
    """Write task.yaml, program.py and generated reviews.

    Returns:
        The files written.

    Raises:
        TaskError: the folder already holds one of them; nothing is overwritten.
    """
    starter = files("trainer") / "starter"
    texts = {name: (starter / name).read_text(encoding="utf-8") for name in ("task.yaml", "program.py")}
    texts["data/reviews.jsonl"] = "".join(json.dumps(row) + "\n" for row in reviews(ROWS))
    taken = [name for name in texts if (folder / name).exists()]
    if taken:
        raise TaskError(
            [f"{folder / name} exists and is not overwritten; choose another folder" for name in taken]
        )
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def reviews(count: int) -> list[dict[str, str]]:
    """Generated reviews with their sentiment: always the same ones."""
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        sentiment = chance.choice(["positive", "negative", "mixed"])
        good, bad = chance.sample(GOOD, 2), chance.sample(BAD, 2)
        said = {"positive": good, "negative": bad, "mixed": [good[0], bad[0]]}[sentiment]
        chance.shuffle(said)
        opening = chance.choice(OPENINGS).format(
            thing=chance.choice(THINGS), month=chance.choice(MONTHS), day=chance.choice(DAYS)
        )
        joined = f"{said[0]}, {'but' if sentiment == 'mixed' else 'and'} {said[1]}"
        rows.append({"text": f"{opening} {joined[0].upper()}{joined[1:]}.", "sentiment": sentiment})
    return rows
