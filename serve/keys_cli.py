"""`python -m serve keys`: who may ask."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serve.guard.egress import STRICTNESS
from serve.guard.keys import add, read, revoke

EXAMPLES = """\
examples:
  python -m serve keys add alice                             shown once, and kept nowhere
  python -m serve keys add batch --task tickets --daily-usd 5 --egress redact
  python -m serve keys list
  python -m serve keys revoke alice                          works within a second, without a restart
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `keys` with its own commands to a command line."""
    parser = subparsers.add_parser(
        "keys",
        help="API keys: add, list, revoke",
        description="The keys in HOMESTILL_HOME/keys.json, as hashes. As soon as there is one, every client needs one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    added = actions.add_parser("add", help="make a key")
    added.add_argument("name", metavar="NAME", help="how logs and caps call it")
    added.add_argument("--task", action="append", metavar="TASK", help="only this task; may be given again")
    added.add_argument("--egress", choices=STRICTNESS, default="allow", help="what may go to the teacher")
    added.add_argument(
        "--daily-usd", type=float, metavar="USD", help="most that its requests may cost a UTC day"
    )
    actions.add_parser("list", help="all keys, without the keys themselves")
    revoked = actions.add_parser("revoke", help="let a key in no longer")
    revoked.add_argument("name", metavar="NAME")


def run(options: argparse.Namespace, home: Path) -> int:
    """Do what the command line says; the exit code.

    Raises:
        SettingsError: a name or value is not allowed, or the file is broken.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / "keys.json"
    if options.action == "add":
        key = add(path, options.name, tasks=options.task, egress=options.egress, daily_usd=options.daily_usd)
        sys.stdout.write(f"{key}\n")
        sys.stderr.write("this is the only time that it is shown\n")
    elif options.action == "revoke":
        left = revoke(path, options.name)
        sys.stdout.write(f"{options.name} is let in no longer\n")
        if not left:
            sys.stderr.write(
                "that was the last stored key: a server that is running still asks for one; started anew, it listens "
                "to this machine alone and lets everybody on it in, unless HOMESTILL_API_KEYS is set\n"
            )
    else:
        for entry in read(path).keys:
            tasks = ", ".join(entry.tasks) if entry.tasks is not None else "all tasks"
            cap = "no cap" if entry.daily_usd is None else f"${entry.daily_usd:g} a day"
            sys.stdout.write(f"{entry.name:20} {entry.created}  {tasks}  egress {entry.egress}  {cap}\n")
    return 0
