#!/usr/bin/env python
"""Writes data/messages.jsonl: 200 made-up messages of hotel guests, about one in seven of them vague.

The seed is fixed: every run writes the same bytes.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SEED = 2026
ROWS = 200
VAGUE_EVERY = 7
ASKING = {"is", "can", "how", "may", "where", "could", "do", "until", "which"}


def sentence(text: str) -> str:
    """Capital letter and full stop or question mark."""
    end = "?" if text.split(maxsplit=1)[0] in ASKING else "."
    return f"{text[0].upper()}{text[1:]}{end}"


def make_message(rng: random.Random, book: dict[str, Any], intent: str, vague: bool) -> dict[str, Any]:
    """One message: a wish, perhaps a greeting, an aside and a closing."""
    wish = rng.choice(book["vague" if vague else "intents"][intent])
    wish = wish.replace("{room}", rng.choice(book["rooms"])).replace("{day}", rng.choice(book["days"]))
    parts = [
        sentence(wish),
        *(sentence(aside) for aside in rng.sample(book["asides"], rng.choice([1, 1, 2]))),
    ]
    if rng.random() < 0.4:
        rng.shuffle(parts)
    if rng.random() < 0.7:
        parts.insert(0, f"{rng.choice(book['open'])}!")
    if rng.random() < 0.7:
        parts.append(sentence(rng.choice(book["close"])))
    return {"text": " ".join(parts), "intent": intent, "is_confident": not vague}


def make_all() -> list[dict[str, Any]]:
    """The rows, intents in equal numbers, no two with the same text."""
    book = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    rng, intents = random.Random(SEED), list(book["intents"])
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS:
        number = len(rows)
        row = make_message(rng, book, intents[number % len(intents)], number % VAGUE_EVERY == 0)
        rows.setdefault(row["text"], row)
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def as_lines(rows: list[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "messages.jsonl").write_text(as_lines(make_all()), encoding="utf-8")
    print(f"{out / 'messages.jsonl'}: {ROWS} messages")


if __name__ == "__main__":
    main()
