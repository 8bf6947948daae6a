"""One line for each thing that is wrong with task.yaml: the value, the rule, the remedy and the line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from trainer.settings import TaskSettings

Location = tuple[str | int, ...]
"""Keys and indices from the top of the file to a value."""


def relevant(errors: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Of a union's errors keep those of the branch that the value has the form of."""
    for error in errors:
        branch = error["loc"][1] if error["loc"][:1] == ("data",) and len(error["loc"]) > 1 else None
        if branch == "str" and any(
            other["loc"][:2] == ("data", "Splits") and len(other["loc"]) > 2 for other in errors
        ):
            continue
        if branch == "Splits" and len(error["loc"]) == 2:
            continue
        yield error


def describe(error: ErrorDetails, lines: dict[Location, int], file: str) -> str:
    """What is wrong, by which rule, and what to do, e.g. `student.method is 'lorra'; use ... (task.yaml:14)`."""
    at = tuple(part for part in error["loc"] if part not in ("str", "Splits"))
    if error["type"] == "invalid_key":
        at = (*at[:-1], str(error["input"]))  # a number or the like, which pydantic does not name as written
    rule = _rule(error, at)
    line = next((lines[at[:size]] for size in range(len(at), 0, -1) if at[:size] in lines), None)
    return f"{rule} ({file}:{line})" if line else f"{rule} ({file})"


def _rule(error: ErrorDetails, at: Location) -> str:
    key, context = dotted(at), error.get("ctx", {})
    match error["type"]:
        case "missing":
            return f"{key} is missing; add it"
        case "extra_forbidden" | "invalid_key":
            return f"{key} is not a known key; {_suggest(at)}"
        case "literal_error":
            return f"{key} is {error['input']!r}; use {str(context['expected']).replace(chr(39), '')}"
        case "value_error":
            return str(context["error"])
        case "string_pattern_mismatch" if at == ("name",):
            return f"name is {error['input']!r}; use 1-40 of a-z, 0-9 and -, starting with a letter or digit"
        case "string_pattern_mismatch" if at == ("retrain", "schedule"):
            return f"{key} is {error['input']!r}; use daily HH:MM (UTC) or every N h, such as daily 03:00"
        case "string_pattern_mismatch":
            return f"{key} is {error['input']!r}; use file.py:Name"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{key} is {error['input']!r}; {_range(at)}"
        case "too_short":
            return f"{key} is empty; name at least one"
        case _:
            return f"{key} is {error['input']!r}; {error['msg'].removeprefix('Input ').replace('should', 'it should')}"


def dotted(at: Location) -> str:
    """The location as people write it: `student.train.rank`."""
    return ".".join(str(part) for part in at) or "the file"


def _section(at: Location) -> type[BaseModel] | None:
    """The settings model that holds the key at `at`."""
    model: type[BaseModel] = TaskSettings
    for part in at[:-1]:
        info = model.model_fields.get(str(part))
        found = next((t for t in _types(info.annotation) if issubclass(t, BaseModel)), None) if info else None
        if found is None:
            return None
        model = found
    return model


def _types(annotation: Any) -> list[type]:
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [part for part in parts if isinstance(part, type)]


def _suggest(at: Location) -> str:
    section = _section(at)
    keys = list(section.model_fields) if section else []
    near = difflib.get_close_matches(str(at[-1]), keys, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(keys)}"


def _range(at: Location) -> str:
    section = _section(at)
    bounds = [str(rule) for rule in section.model_fields[str(at[-1])].metadata] if section else []
    signs = {"Gt(gt=": "above ", "Ge(ge=": "at least ", "Lt(lt=": "below ", "Le(le=": "at most "}
    words = [
        sign + rule[len(start) : -1]
        for rule in bounds
        for start, sign in signs.items()
        if rule.startswith(start)
    ]
    return f"use a number {' and '.join(words)}"
