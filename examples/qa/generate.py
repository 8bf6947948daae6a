#!/usr/bin/env python
"""Writes data/questions.jsonl: two technical questions about every fact of facts.yaml, with their answers.

The order is fixed by a seed: every run writes the same bytes.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SEED = 2026


def make_all() -> list[dict[str, str]]:
    """The rows: what a name does, and which name does it."""
    book: dict[str, Any] = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    rows = []
    for kind in book["kinds"].values():
        what, which = kind["ask"]
        for fact in kind["facts"]:
            name, does = (part.strip() for part in fact.split("|"))
            rows.append({"question": what.format(name=name), "answer": kind["answer"].format(does=does)})
            rows.append({"question": which.format(does=does), "answer": name})
    random.Random(SEED).shuffle(rows)
    return rows


def as_lines(rows: list[dict[str, str]]) -> str:
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
    rows = make_all()
    (out / "questions.jsonl").write_text(as_lines(rows), encoding="utf-8")
    print(f"{out / 'questions.jsonl'}: {len(rows)} questions")


if __name__ == "__main__":
    main()
