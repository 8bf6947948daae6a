"""General conversations, each ending with the assistant's answer: mixed in by replay, judged by the forgetting study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.data import READERS
from trainer.errors import DataError

ROLES = ("system", "user", "assistant")
MAX_FAULTS = 20

Messages = list[dict[str, str]]
"""Messages of role and content; the last one is the reference answer."""


def read(file: Path) -> list[Messages]:
    """JSON lines of {"messages": [...]} that end with the assistant, or of {"question", "answer"}.

    Raises:
        DataError: with every bad row's line.
    """
    found: list[Messages] = []
    faults = []
    try:
        for number, row in READERS[".jsonl"](file):
            turns = row if isinstance(row, str) else _turns(row)
            if isinstance(turns, str):
                faults.append(f"{file.name}:{number}: {turns}")
            else:
                found.append(turns)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([f"{file} cannot be read: {error}; name a file of JSON lines in UTF-8"]) from None
    if faults:
        count = f"{len(faults)} bad row{'s' if len(faults) > 1 else ''}"
        raise DataError([f"{count} in {file}; mend or remove them:", *faults[:MAX_FAULTS]])
    if not found:
        raise DataError([f"{file} holds no rows; write one question with its answer a line"])
    return found


def _turns(row: dict[str, Any]) -> Messages | str:
    """The conversation of a row, or its fault."""
    turns: Any = row.get("messages")
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        turns = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    if not isinstance(turns, list) or not all(_turn(turn) for turn in turns):
        return 'no conversation; write {"messages": [{"role", "content"}, ...]} or {"question", "answer"}'
    for role in (turn["role"] for turn in turns if turn["role"] not in ROLES):
        return f"a message's role is {role!r}; use {', '.join(ROLES)}"
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        return "does not end with an assistant's answer; add it"
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _turn(turn: object) -> bool:
    return (
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    )
