#!/usr/bin/env python
"""Writes data/train.jsonl, calibrate.jsonl and test.jsonl: made-up support tickets with gold answers.

The seed is fixed: every run writes the same bytes. `train` holds the six known kinds only; about 6 %
of `calibrate` and `test` are of kinds that training never sees, with the gold category `other`.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SEED = 2026
SIZES = {"train": (640, 0), "calibrate": (378, 22), "test": (330, 20)}  # known, unseen

ASKING = {"how", "when", "where", "could", "can", "is", "have", "do", "may", "would"}


@dataclass(frozen=True)
class Ticket:
    """A row of the data."""

    text: str
    category: str
    priority: str
    entities: list[str]
    summary: str


def make_reference(rng: random.Random) -> str:
    """The number of an order, an invoice or a customer, such as #48213."""
    return f"#{rng.randrange(1000, 100_000)}"


def fill(rng: random.Random, phrase: str, product: str, book: dict[str, Any], found: list[str]) -> str:
    """Replaces the slots of a phrase and notes the references, in order."""
    slots = {"{p}": product, "{r}": make_reference(rng), "{d}": rng.choice(book["days"])}
    for slot in sorted((s for s in slots if s in phrase), key=phrase.index):
        if slot == "{r}":
            found.append(slots[slot])
        phrase = phrase.replace(slot, slots[slot])
    return phrase


def sentence(phrase: str) -> str:
    """Capital letter and full stop or question mark."""
    end = "?" if phrase.split(maxsplit=1)[0] in ASKING else "."
    return phrase[0].upper() + phrase[1:] + ("" if phrase[-1] in ".!?" else end)


def make_ticket(rng: random.Random, book: dict[str, Any], kinds: dict[str, Any], kind: str) -> Ticket:
    """A ticket of a kind; its sentences come in any order."""
    issue, summary = rng.choice(kinds[kind]["issues"]).split(" | ")
    product, priority = rng.choice(book["products"]), rng.choice(list(book["urgency"]))
    parts = [issue, rng.choice(book["urgency"][priority])]
    parts += rng.sample(kinds[kind]["details"], rng.choice([0, 1, 1]))
    parts += rng.sample(book["aside"], rng.choice([1, 1, 2]))
    head, tail = parts[0], parts[1:]
    rng.shuffle(tail)
    place = rng.choice([0, 0, 1, len(tail)])
    found: list[str] = []
    words = [sentence(fill(rng, part, product, book, found)) for part in [*tail[:place], head, *tail[place:]]]
    if rng.random() < 0.5:
        words.insert(0, rng.choice(book["open"]) + ",")
    if rng.random() < 0.5:
        words.append(f"{rng.choice(book['close'])}, {rng.choice(book['people'])}")
    text = " ".join(words)
    return Ticket(
        text, kind if kinds is book["known"] else "other", priority, found, summary.replace("{p}", product)
    )


def make_split(rng: random.Random, book: dict[str, Any], known: int, unseen: int) -> list[Ticket]:
    """Kinds in equal numbers, in mixed order."""
    wanted = [(book["known"], list(book["known"])[i % len(book["known"])]) for i in range(known)]
    wanted += [(book["unseen"], list(book["unseen"])[i % len(book["unseen"])]) for i in range(unseen)]
    rng.shuffle(wanted)
    return [make_ticket(rng, book, kinds, kind) for kinds, kind in wanted]


def make_all() -> dict[str, list[Ticket]]:
    """Split -> tickets."""
    book = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    return {name: make_split(random.Random(f"{SEED} {name}"), book, *sizes) for name, sizes in SIZES.items()}


def as_lines(tickets: list[Ticket]) -> str:
    """JSON lines."""
    return "".join(json.dumps(asdict(ticket), ensure_ascii=False) + "\n" for ticket in tickets)


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, tickets in make_all().items():
        (out / f"{name}.jsonl").write_text(as_lines(tickets), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(tickets)} tickets")


if __name__ == "__main__":
    main()
