"""The commands that keep a box going: backup, restore, upgrade, prune."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from trainer.runs import Home
from trainer.terminal import console

out = console()
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the backup.")]


def add_to(app: typer.Typer) -> None:
    """Mount the commands on the `homestill` command."""
    panel = "Upkeep"
    app.command(epilog="Example: homestill backup /mnt/backup/box", rich_help_panel=panel)(backup)
    app.command(epilog="Example: homestill restore /mnt/backup/box", rich_help_panel=panel)(restore)
    app.command(epilog="Example: homestill upgrade", rich_help_panel=panel)(upgrade)
    app.command(epilog="Examples: homestill prune · homestill prune --yes", rich_help_panel=panel)(prune)


def backup(folder: Folder) -> None:
    """Copy databases, releases, tasks and settings while everything runs; again into the same folder is quicker."""
    from trainer.keeping.backup import backup as make

    contents = make(_home().root, folder, datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
    size = sum(file.bytes for file in contents.files)
    out.print(f"{folder}: {len(contents.files)} files, {size / 1e6:.1f} MB", highlight=False)


def restore(
    folder: Folder,
    force: Annotated[
        bool, typer.Option("--force", help="Set what is there aside, in before-restore-1.")
    ] = False,
) -> None:
    """Check a backup and put it in place; the endpoint, the watch and all runs must be stopped."""
    from trainer.keeping.backup import restore as put_back

    contents = put_back(folder, _home().root, force=force)
    out.print(
        f"restored {len(contents.files)} files of {contents.created} into {_home().root}", highlight=False
    )


def upgrade() -> None:
    """Migrate databases that an earlier version wrote, and check every release; safe to run again."""
    from trainer.keeping.upgrade import upgrade as migrate

    steps = migrate(_home())
    for step in steps:
        out.print(f"{step.name}: {step.text}", highlight=False, markup=False)
    if not steps:
        out.print(f"there is nothing in {_home().root} yet", highlight=False)
    if not all(step.sound for step in steps):
        raise typer.Exit(1)


def prune(
    keep: Annotated[int, typer.Option(min=0, help="Newest releases of a task that stay.")] = 3,
    days: Annotated[
        float, typer.Option(min=0, help="Runs that were touched within so many days stay.")
    ] = 14.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what would go.")] = False,
) -> None:
    """Say what may go, or remove it: never traces, the current release, the one before it, or DSPy's tunings."""
    from trainer.keeping.prune import Policy, carry_out, plan

    home = _home()
    planned = plan(home, Policy(releases=keep, days=days))
    for item in planned.items:
        out.print(f"{item.kind}: {item.path}", highlight=False, markup=False)
    remover = _model_remover() if planned.models else None
    for name in planned.models:
        out.print(
            f"model in Ollama: {name}{'' if remover else ' (OLLAMA_HOST is not in use here: it stays)'}"
        )
    if yes:
        carry_out(planned, home, remover)
    verb = "freed" if yes else "would be freed; remove with --yes"
    out.print(f"{planned.bytes / 1e9:.2f} GB {verb}", highlight=False)


def _model_remover() -> Callable[[str], None] | None:
    from trainer.runtimes.choice import choice, ollama

    return ollama(os.environ).remove if choice(os.environ) == "ollama" else None


def _home() -> Home:
    return Home.from_environment(os.environ)
