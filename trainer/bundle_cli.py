"""The commands around bundles: bundle, verify, load, export-traces, import-traces."""

from __future__ import annotations

import os
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.errors import BundleError
from trainer.runs import Home
from trainer.terminal import console

if TYPE_CHECKING:
    from trainer.bundle.write import Source

out = console()
GIGABYTE = 1_000_000_000
OutArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the bundle; it is made.")]
Tasks = Annotated[
    list[Path], typer.Option("--task", metavar="TASK", help="A task folder; may be given again.")
]
Key = Annotated[Path, typer.Option("--key", help="Private key to sign with; made where there is none.")]
PartSize = Annotated[float, typer.Option("--part-size", min=0.000001, help="Largest part, in GB.")]


def add_to(app: typer.Typer) -> None:
    """Mount the commands on the `homestill` command."""
    panel = "Other hosts"
    example = "Example: homestill bundle /media/usb/box --task tickets --key box.key"
    app.command(epilog=example, rich_help_panel=panel)(bundle)
    app.command(
        name="export-traces",
        epilog="Example: homestill export-traces /media/usb/out --task tickets --key box.key",
        rich_help_panel=panel,
    )(export_traces)
    app.command(
        name="import-traces",
        epilog="Example: homestill import-traces /media/usb/out --trust box.key.pub",
        rich_help_panel=panel,
    )(import_traces)
    for action in ("verify", "copy", "load"):
        _add_tool(app, action, panel)


def bundle(
    folder: OutArgument,
    *,
    task: Tasks,
    key: Key,
    image: Annotated[list[str] | None, typer.Option(help="A container image; may be given again.")] = None,
    part_size: PartSize = 4.0,
    releases: Annotated[bool, typer.Option(help="Carry each task's current release.")] = True,
    bases: Annotated[bool, typer.Option(help="Carry base models from the cache.")] = True,
    traces: Annotated[bool, typer.Option(help="Carry the teacher's traces, to train again from.")] = True,
    requests: Annotated[bool, typer.Option("--requests", help="Carry the endpoint's journal, too.")] = False,
) -> None:
    """Write a signed bundle for a host without a network; an interrupted one goes on where it stopped."""
    from trainer import task as tasks
    from trainer.bundle.contents import BUNDLE
    from trainer.bundle.gather import Wanted, gather

    wanted = Wanted(
        [tasks.load(each) for each in task],
        image or [],
        releases=releases,
        bases=bases,
        traces=traces,
        requests=requests,
    )
    now = _now()
    with tempfile.TemporaryDirectory() as work:
        found = gather(wanted, _home(), os.environ, Path(work), now)
        _seal(folder, found.sources, kind=BUNDLE, about=found.about, key=key, part_size=part_size, now=now)


def export_traces(
    folder: OutArgument,
    task: Tasks,
    key: Key,
    part_size: PartSize = 4.0,
    requests: Annotated[bool, typer.Option(help="What the endpoint was asked, too.")] = True,
) -> None:
    """Write a task's traces and journal as a signed export, for the next round at home."""
    from trainer import task as tasks
    from trainer.bundle.contents import EXPORT
    from trainer.bundle.gather import Wanted, traces_of

    home = _home()
    wanted = Wanted([tasks.load(each) for each in task], requests=requests)
    with tempfile.TemporaryDirectory() as work:
        sources = traces_of(wanted, home, Path(work), os.environ)
        if not sources:
            raise BundleError([f"there are no traces of these tasks in {home.root}; nothing was exported"])
        _seal(folder, sources, kind=EXPORT, about={}, key=key, part_size=part_size, now=_now())


def import_traces(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export of `homestill export-traces`.")],
    trust: Annotated[str, typer.Option("--trust", metavar="KEY", help="Public key of the export's maker.")],
) -> None:
    """Verify a signed export and take what is new in it; safe to run again."""
    from trainer.bundle.carry import take
    from trainer.bundle.contents import EXPORT
    from trainer.bundle.verify import check, extract, trusted_key

    contents = check(folder, EXPORT, trusted_key(trust))
    with tempfile.TemporaryDirectory() as work:
        for file in contents.below("traces"):
            carried = Path(work) / file.path
            extract(folder, file, carried)
            out.print(take(carried, _home()).sentence(), highlight=False)


def _add_tool(app: typer.Typer, action: str, panel: str) -> None:
    """A command of the tool that every bundle carries, with the tool's own options."""

    def command(context: typer.Context) -> None:
        from trainer.bundle.__main__ import main

        raise typer.Exit(main([action, *context.args]))

    command.__doc__ = {
        "verify": "Is every byte of a bundle what its maker signed?",
        "copy": "Copy a bundle; an interrupted copy goes on where it stopped.",
        "load": "Verify a bundle, then install or upgrade from it; safe to run again.",
    }[action]
    app.command(
        name=action,
        epilog=f"Example: homestill {action} /media/usb/box --trust box.key.pub",
        rich_help_panel=panel,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
    )(command)


def _home() -> Home:
    return Home.from_environment(os.environ)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _seal(
    folder: Path,
    sources: list[Source],
    *,
    kind: str,
    about: dict[str, Any],
    key: Path,
    part_size: float,
    now: str,
) -> None:
    from trainer.bundle import keys
    from trainer.bundle.write import write

    if keys.make_if_missing(key):
        out.print(f"made the key {key}; keep it where no bundle goes", highlight=False)
    contents = write(
        folder,
        sources,
        kind=kind,
        created=now,
        homestill=version("homestill"),
        about=about,
        seal=lambda where, data: keys.sign(where, key, data),
        part_bytes=round(part_size * GIGABYTE),
    )
    parts = list(contents.parts())
    out.print(
        f"{folder}: {len(contents.files)} files in {len(parts)} parts, {sum(each.bytes for each in parts) / 1e6:.1f} MB"
    )
    public = keys.public(key).hex()
    out.print(
        f"public key, to be told by another way than the bundle: {public}", highlight=False, soft_wrap=True
    )
