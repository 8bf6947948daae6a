"""`homestill watch`."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trainer import gpu, process, watching
from trainer.runs import Home, locked
from trainer.watch import Watch, require_folder

DOCTOR_S = 300.0
PULSE_FILE = "homestill.pulse"


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of task folders, or one task folder.")
    ] = Path("tasks"),
    once: Annotated[bool, typer.Option("--once", help="Look once, run what is due, and end.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 30.0,
) -> None:
    """Run every task, then again whenever task, program or data change, by the task's `retrain` policy."""
    environment = dict(os.environ)
    require_folder(folder)
    gpu.check(environment)
    home = Home.from_environment(environment)
    home.create()
    # a file that the container's health check looks at; it dies with the container
    pulse = partial(Path(tempfile.gettempdir(), PULSE_FILE).touch)
    with locked(home.root / "watch", "watch"), closing(watching.Stopping()) as stopping:
        child = watching.Child(environment, stopping, pulse)
        watch = Watch(home, folder, child, stopping, partial(watching.new_answers, home), pulse=pulse)
        with watching.stopped_by_signals(stopping, child.interrupt):
            if once:
                watch.look()
            else:
                typer.echo(process.run(process.module("trainer", "doctor"), timeout=DOCTOR_S).output)
                watch.forever(every)
