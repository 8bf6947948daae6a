"""`python -m serve journal`: what was served, on the command line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from serve.errors import JournalError
from serve.records.entry import Entry, to_line
from serve.records.journal import Journal
from serve.records.reading import Extent, Selection, Totals

EXAMPLES = """\
examples:
  python -m serve journal stats                              requests, tokens and cost by day, task and reason
  python -m serve journal list --task tickets --limit 50     the last 50, newest first
  python -m serve journal show req_4f1c…                     one of them, whole
  python -m serve journal delete --older-than 30d            says what it would delete, and asks
  python -m serve journal delete --key alice --yes           all that alice's key ever asked
  python -m serve journal export --jsonl requests.jsonl      one request a line; - for the standard output
"""
UNITS = {"h": "hours", "d": "days", "w": "weeks"}
GONE = "-"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `journal` with its own commands to a command line."""
    parser = subparsers.add_parser(
        "journal",
        help="what was served: figures, requests, deletion, export",
        description="Reads and clears HOMESTILL_HOME/journal.db, also while the server runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="requests, tokens and cost by day, task, route and reason")
    stats.add_argument("--days", type=_count, default=30, help="how far back (default 30)")
    listed = actions.add_parser("list", help="the last requests, newest first")
    listed.add_argument("--limit", type=_count, default=20, help="how many (default 20)")
    shown = actions.add_parser("show", help="one request, whole, as JSON")
    shown.add_argument("id", metavar="ID", help="the x-request-id of its answer")
    deleted = actions.add_parser("delete", help="delete requests for good")
    deleted.add_argument("--older-than", type=_age, metavar="AGE", help="such as 12h, 30d or 8w")
    deleted.add_argument("--yes", action="store_true", help="do not ask")
    exported = actions.add_parser("export", help="write requests as JSON lines, oldest first")
    exported.add_argument(
        "--jsonl", required=True, metavar="FILE", help="where to; - for the standard output"
    )
    for action in (listed, deleted, exported):
        action.add_argument("--key", metavar="NAME", help="only those asked with this API key")
        action.add_argument("--task", metavar="NAME", help="only those of this task")


def run(options: argparse.Namespace, home: Path) -> int:
    """Do what the command line says; the exit code.

    Args:
        home: HOMESTILL_HOME.

    Raises:
        JournalError: there is no journal, or it cannot be read or written.
    """
    file = home / "journal.db"
    if not file.is_file():
        raise JournalError(
            f"there is no journal in {home}; serve first, or set HOMESTILL_HOME to another home"
        )
    journal = Journal(f"sqlite:///{file}")
    try:
        return {"stats": _stats, "list": _list, "show": _show, "delete": _delete, "export": _export}[
            options.action
        ](journal, options)
    finally:
        journal.close()


def _stats(journal: Journal, options: argparse.Namespace) -> int:
    extent = journal.extent()
    _say(f"{_described(extent)} in all")
    rows = [_totals(each) for each in journal.summary(datetime.now(UTC) - timedelta(days=options.days))]
    if rows:
        head = [
            "day",
            "task",
            "endpoint",
            "route",
            "reason",
            "requests",
            "failed",
            "tokens_in",
            "tokens_out",
            "cost_usd",
            "mean_ms",
        ]
        _table([head, *rows])
    return 0


def _list(journal: Journal, options: argparse.Namespace) -> int:
    entries = journal.recent(options.limit, Selection(key=options.key, task=options.task))
    if not entries:
        _say("no requests")
        return 0
    _table(
        [
            ["id", "created", "task", "key", "status", "route", "reason", "confidence", "ms"],
            *map(_row, entries),
        ]
    )
    return 0


def _show(journal: Journal, options: argparse.Namespace) -> int:
    entry = journal.find(options.id)
    if entry is None:
        raise JournalError(
            f"there is no request {options.id} in the journal; `journal list` names the last ones"
        )
    _say(orjson.dumps(asdict(entry), option=orjson.OPT_INDENT_2).decode())
    return 0


def _delete(journal: Journal, options: argparse.Namespace) -> int:
    before = datetime.now(UTC) - options.older_than if options.older_than else None
    selection = Selection(before, options.key, options.task)
    if selection == Selection():
        raise JournalError("delete needs to be told what; give --older-than, --key or --task")
    extent = journal.extent(selection)
    if not extent.requests:
        _say("nothing to delete")
        return 0
    _say(f"{_described(extent)} to delete")
    if not options.yes and not _agreed():
        _say("nothing was deleted; add --yes to delete without being asked")
        return 1
    count = journal.delete(selection)
    _say(f"{count} requests deleted; journal.db keeps its size and uses the room again")
    return 0


def _export(journal: Journal, options: argparse.Namespace) -> int:
    entries = journal.every(Selection(key=options.key, task=options.task))
    if options.jsonl == "-":
        for entry in entries:
            sys.stdout.buffer.write(to_line(entry) + b"\n")
        sys.stdout.buffer.flush()
        return 0
    target = Path(options.jsonl)
    try:
        count = _write(target, entries)
    except OSError as error:
        raise JournalError(f"{target} cannot be written ({error}); name another file") from error
    _say(f"{count} requests written to {target}")
    return 0


def _write(target: Path, entries: Iterable[Entry]) -> int:
    """Whole or not at all, and readable by nobody else: it holds what people asked."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    count = 0
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for entry in entries:
                file.write(to_line(entry) + b"\n")
                count += 1
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def _agreed() -> bool:
    if not sys.stdin.isatty():
        return False
    _say("Delete them for good? [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _described(extent: Extent) -> str:
    span = f", {extent.oldest} to {extent.newest}" if extent.requests else ""
    return f"{extent.requests} requests with {_size(extent.body_bytes)} of messages and answers{span}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _totals(each: Totals) -> list[str]:
    names = [each.day, *(value or GONE for value in (each.task, each.endpoint, each.route, each.reason))]
    counts = [
        str(value) for value in (each.requests, each.failed, each.prompt_tokens, each.completion_tokens)
    ]
    return [*names, *counts, f"{each.cost_usd:.4f}", f"{each.latency_ms:.1f}"]


def _row(entry: Entry) -> list[str]:
    confidence = GONE if entry.confidence is None else f"{entry.confidence:.3f}"
    names = [value or GONE for value in (entry.task, entry.key, str(entry.status), entry.route, entry.reason)]
    return [entry.id, entry.created, *names, confidence, f"{entry.latency_ms:.1f}"]


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest value."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def _age(value: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,5})([hdw])", value)
    if not match:
        raise argparse.ArgumentTypeError(f"{value!r} is no age; use a number with h, d or w, such as 30d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def _count(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is no count; use 1 to 99999")
    return int(value)
