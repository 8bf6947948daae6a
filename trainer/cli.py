"""The `homestill` command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from trainer import bundle_cli, keeping_cli, pipeline, study_cli, task, watch_cli
from trainer.errors import HomestillError, told
from trainer.process import QUIET
from trainer.runs import Home, Run, holder, read_json
from trainer.terminal import console, table
from trainer.traces import Store

app = typer.Typer(
    name="homestill",
    help="Turn a DSPy program that runs on an API model into a model of your own, and serve both behind one endpoint.",
    epilog="Start with: homestill init my-task && homestill run my-task --dry-run",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = console()
err = console(stderr=True)

TaskArgument = Annotated[Path, typer.Argument(metavar="TASK", help="A task folder, or its task.yaml.")]
Force = Annotated[bool, typer.Option("--force", help="Go on with too few or unlearnable examples.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Teacher calls at a time; overrides task.yaml.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the teacher will cost and stop.")]


@contextmanager
def _opened(folder: Path, *, force: bool = False, concurrency: int | None = None) -> Iterator[Run]:
    loaded = task.load(folder)
    home = Home.from_environment(os.environ)
    home.create()
    store = Store.open(home.database_url)
    try:
        yield pipeline.open_run(loaded, home, store, os.environ, force=force, concurrency=concurrency)
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here", highlight=False)
        raise
    finally:
        store.close()


@app.command(epilog="Example: homestill init my-task")
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")]) -> None:
    """Write a small task that runs, to start from."""
    from trainer.init import write_starter

    for file in write_starter(folder):
        out.print(f"wrote {file}", highlight=False)
    out.print(f"\nnext: homestill check {folder}, then homestill run {folder} --dry-run", highlight=False)


@app.command(epilog="Example: homestill check my-task")
def check(folder: TaskArgument = Path(), force: Force = False) -> None:
    """Validate task.yaml, program, metric, data, and the base if it is here; nothing is called or fetched."""
    from trainer import preflight, program
    from trainer.splits import assigned

    loaded = task.load(folder)
    known = preflight.without_network(loaded, Home.from_environment(os.environ), force=force)
    splits, found = assigned(loaded), program.load(loaded)
    rows = len(splits.examples()) + sum(map(len, splits.dropped.values()))
    out.print(f"[green]task {loaded.name} is valid[/]: {rows} rows, predictors {', '.join(found.predictors)}")
    if not known:
        base = loaded.settings.student.base
        out.print(
            f"student.base {base} is not here yet: run fetches it, and looks then whether it fits",
            highlight=False,
        )
    sizes = ", ".join(f"{name} {len(splits.splits[name])}" for name in ("train", "calibrate", "test"))
    gone = ", ".join(f"{len(ids)} {reason}" for reason, ids in splits.dropped.items())
    out.print(f"{sizes}{f'; left out: {gone}' if gone else ''}", highlight=False)


@app.command(
    epilog="Examples: homestill run my-task --dry-run · homestill run my-task · homestill run my-task --until curate"
)
def run(
    folder: TaskArgument = Path(),
    dry_run: DryRun = False,
    force: Force = False,
    concurrency: Concurrency = None,
    until: Annotated[str, typer.Option(help=f"Last stage: {', '.join(pipeline.ORDER)}.")] = pipeline.ORDER[
        -1
    ],
) -> None:
    """Run all stages that are not up to date, from capture to release. Stop it at any time and run it again."""
    from trainer import preflight

    if until not in pipeline.ORDER:
        raise typer.BadParameter(
            f"{until!r} is no stage; use one of {', '.join(pipeline.ORDER)}", param_hint="--until"
        )
    with _opened(folder, force=force, concurrency=concurrency) as here:
        if dry_run:
            _quote(here)
            return
        names = pipeline.ORDER[: pipeline.ORDER.index(until) + 1]
        if "train" in names and pipeline.status(here.folder)["capture"] != "done":
            preflight.check(here)
        done = pipeline.execute(here, map(_stage, names))
        if not done:
            out.print("nothing to do: every stage is up to date", highlight=False)
        if until == pipeline.ORDER[-1]:
            _outcome(here)


def _stage(name: str) -> pipeline.Stage:
    from trainer.gpu import freeing

    return freeing(pipeline.stage(name))


def _quote(here: Run) -> None:
    from trainer.capture import TERMS, estimate

    out.print(
        f"{estimate(here).sentence()} (budget ${here.task.settings.teacher.budget_usd:g})", highlight=False
    )
    out.print(TERMS, style="dim")


def _outcome(here: Run) -> None:
    """The table that a run ends with."""
    from trainer.release import outcome

    found = outcome(here)
    shown = table("", "score", "95 % interval", "n", "p50 ms", "USD per 1k", title=found.title)
    for row in found.rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)
    for line in found.lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _stage_command(name: str, text: str) -> None:
    def command(folder: TaskArgument = Path(), force: Force = False, concurrency: Concurrency = None) -> None:
        with _opened(folder, force=force, concurrency=concurrency) as here:
            pipeline.require(here, name)
            if not pipeline.execute(here, [_stage(name)]):
                out.print(f"{name}: nothing to do", highlight=False)

    command.__doc__ = text
    app.command(name=name, epilog=f"Example: homestill {name} my-task", rich_help_panel="Stages")(command)


for _name, _text in {
    "capture": "Ask the teacher every example; traces are stored as they come, nothing is paid twice.",
    "curate": "Filter, dedupe, balance and split the traces.",
    "train": "Fine-tune the base on the kept traces.",
    "export": "Convert to GGUF and quantise.",
    "register": "Register with Ollama or the embedded runtime and prove parity.",
    "evaluate": "Score teacher, base and student.",
    "certify": "Fit the confidence model and certify the threshold.",
    "release": "Write the release and promote it if the gate lets it through.",
}.items():
    _stage_command(_name, _text)


@app.command(epilog="Example: homestill harvest my-task && homestill run my-task")
def harvest(folder: TaskArgument = Path()) -> None:
    """Take the teacher's answers from the endpoint's journal as training rows of the next run."""
    from trainer.harvest import harvest as gather

    with _opened(folder) as here:
        found = gather(here.task, here.home, here.store)
    out.print(f"{found.new} new answers of the teacher, {found.known} known already", highlight=False)
    for reason, count in found.left_out.most_common():
        out.print(f"{count} left out: {reason}", highlight=False)
    if found.new:
        out.print(f"\nnext: homestill run {folder}", highlight=False)


app.command(name="watch", epilog="Examples: homestill watch tasks · homestill watch tasks --once")(
    watch_cli.command
)
app.add_typer(study_cli.app)
bundle_cli.add_to(app)
keeping_cli.add_to(app)


@app.command(epilog="Example: homestill status")
def status() -> None:
    """Show every task's runs, stages and current release."""
    home = Home.from_environment(os.environ)
    folders = sorted(home.runs("").glob("*/*/task.json"), key=lambda file: file.stat().st_mtime)
    shown = table("task", "run", "stages", "current release")
    shown.columns[-1].no_wrap = True  # to be copied into `rollback`
    for file in folders:
        about, run = read_json(file), file.parent
        name = about["settings"]["name"]
        process, at = holder(run.parent)
        at_work = f"process {process} is in" if at == run.name else ""
        told = _tuning if about.get("folder", "") is None else _progress
        current = home.releases(name) / "current"
        version = current.read_text(encoding="utf-8").strip() if current.is_file() else "none"
        shown.add_row(name, run.name, told(pipeline.status(run), at_work), version)
    out.print(shown if folders else f"no runs below {home.root}; start with: homestill init my-task")


def _progress(states: dict[str, str], at_work: str) -> str:
    """How far a run is: its first stage that is not done, and whether that was begun or is being worked at."""
    for number, (name, state) in enumerate(states.items()):
        if state != "done":
            begun = "[yellow]interrupted in[/]" if state == "interrupted" else "next is"
            return f"{number} of {len(states)}, {at_work or begun} {name}"
    return f"[green]all {len(states)} done[/]"


def _tuning(states: dict[str, str], at_work: str) -> str:
    """The same of a run of DSPy's optimizers, which has no task folder and ends with `register`."""
    if states["register"] == "done":
        return "tuning by DSPy, [green]done[/]"
    return f"tuning by DSPy, {f'{at_work} it' if at_work else '[yellow]interrupted[/]'}"


@app.command(
    epilog="Examples: homestill rollback tickets · homestill rollback tickets 20261120T221500Z-1a2b3c4d"
)
def rollback(
    name: Annotated[str, typer.Argument(metavar="TASK", help="A task's name or folder.")],
    version: Annotated[
        str | None, typer.Argument(help="A version; the one before the current by default.")
    ] = None,
) -> None:
    """Make an earlier release the current one; a running endpoint picks it up by itself."""
    from trainer import release

    folder = Path(name)
    known = task.load(folder).name if (folder / "task.yaml").is_file() else name
    chosen = release.rollback(Home.from_environment(os.environ), known, version)
    out.print(f"{known}: current is now {chosen}", highlight=False)


@app.command(
    epilog="Examples: homestill serve · homestill serve --port 9000 · HOMESTILL_OFFLINE=1 homestill serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(context: typer.Context) -> None:
    """Serve the hybrid endpoint (the same as `python -m serve`, whose options it takes)."""
    from serve.__main__ import main as serve_main

    raise typer.Exit(serve_main(context.args))


@app.command(epilog="Examples: homestill doctor · homestill doctor my-task · homestill doctor --offline")
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="TASK", help="Also estimate what training this task takes.")
    ] = None,
    unload: Annotated[bool, typer.Option("--unload", help="Let Ollama give its memory back first.")] = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Would a day without a network work, and does anything call out?"),
    ] = False,
) -> None:
    """Say what this machine has, what is missing, and what to do about it."""
    from trainer import offline_check
    from trainer.doctor import examine, examine_task, unload_models

    if unload:
        for model in unload_models(os.environ):
            out.print(f"unloaded {model.name}, {model.size / 1e9:.1f} GB", highlight=False)
    home = Home.from_environment(os.environ)
    findings = (offline_check.examine if offline else examine)(home, os.environ)
    if folder:
        with _opened(folder) as here:
            findings += examine_task(here)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    shown = table("", "state", "")
    for finding in findings:
        shown.add_row(finding.name, marks[finding.state], escape(finding.text))
    out.print(shown)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry of the console script: our errors become lines on standard error and an exit code."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("homestill").setLevel(logging.WARNING)
    try:
        app()
    except HomestillError as error:
        for line in str(error).splitlines():
            err.print(f"[red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        err.print(f"[red]error:[/] {escape(told(error))}", highlight=False)
        sys.exit(1)
