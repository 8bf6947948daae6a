#!/usr/bin/env python
"""Writes data/reports.jsonl: 200 made-up news reports with category, names, reasoning and summary.

The seed is fixed: every run writes the same bytes. People, places and organisations are invented.
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
SLOTS = ("{person}", "{place}", "{group}")


def fill(text: str, chosen: dict[str, str]) -> str:
    """Puts names, numbers and days into a phrase."""
    for slot, value in chosen.items():
        text = text.replace(slot, value)
    return text[0].upper() + text[1:]


def choose(rng: random.Random, book: dict[str, Any], kind: str) -> dict[str, str]:
    """What stands in the slots of one report."""
    return {
        "{person}": f"{rng.choice(book['first'])} {rng.choice(book['last'])}",
        "{place}": rng.choice(book["places"]),
        "{group}": rng.choice(book["kinds"][kind]["groups"]),
        "{number}": str(rng.randrange(3, 90)),
        "{day}": rng.choice(book["days"]),
    }


def make_report(rng: random.Random, book: dict[str, Any], kind: str) -> dict[str, Any]:
    """One report: an event, a detail, and remarks that fit any report, in any order after the event."""
    chosen = choose(rng, book, kind)
    event, summary, sign = (part.strip() for part in rng.choice(book["kinds"][kind]["events"]).split("|"))
    rest = [rng.choice(book["kinds"][kind]["details"]), *rng.sample(book["remarks"], 2)]
    rng.shuffle(rest)
    template = " ".join(f"{sentence}." for sentence in [event, *rest])
    text = " ".join(fill(f"{sentence}.", chosen) for sentence in [event, *rest])
    places = {slot: template.index(slot) for slot in SLOTS if slot in template}
    return {
        "text": text,
        "reasoning": f"The report is about {sign}, which belongs to {kind}.",
        "category": kind,
        "entities": [chosen[slot] for slot in sorted(places, key=places.__getitem__)],
        "summary": fill(f"{summary}.", chosen),
    }


def make_all() -> list[dict[str, Any]]:
    """The rows, categories in equal numbers, no two with the same text."""
    book = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    rng, kinds = random.Random(SEED), list(book["kinds"])
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < ROWS:
        row = make_report(rng, book, kinds[len(rows) % len(kinds)])
        if row["text"] not in seen:
            seen.add(row["text"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


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
    (out / "reports.jsonl").write_text(as_lines(make_all()), encoding="utf-8")
    print(f"{out / 'reports.jsonl'}: {ROWS} reports")


if __name__ == "__main__":
    main()
