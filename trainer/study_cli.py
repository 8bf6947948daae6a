"""`homestill study`: what prompts, weights, demonstrations and instructions each bring, and what was forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trainer import pipeline, task
from trainer.errors import TaskError
from trainer.runs import Home, locked
from trainer.terminal import console
from trainer.traces import Store

if TYPE_CHECKING:
    from trainer.studies.report import Outcome
    from trainer.studies.study import Study, System

app = typer.Typer(
    name="study",
    help="Measure what prompts, weights, demonstrations and instructions each bring, and what was forgotten.",
    epilog="Every study goes on where it was stopped, and ends with one HTML file.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
out = console()
err = console(stderr=True)

LOCAL = "local answers cost nothing; a metric that asks a model pays for it, within teacher.budget_usd"
ONE_PREDICTOR = "student.predictor is set, and studies ask one model for the whole program; study it without"
TaskArgument = Annotated[Path, typer.Argument(metavar="TASK", help="A task folder, or its task.yaml.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it will ask and cost, and stop.")]
Limit = Annotated[
    int | None,
    typer.Option(min=2, help="Test examples that are asked; all by default. Fewer: wider intervals."),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=128,
        help="Tokens of prompt and answer that the embedded runtime holds; student.context by default.",
    ),
]
Optimizer = Literal["bootstrap", "random_search", "mipro", "gepa"]


@app.command(epilog="Examples: homestill study order my-task --dry-run · homestill study order my-task")
def order(
    folder: TaskArgument = Path(),
    *,
    dry_run: DryRun = False,
    limit: Limit = None,
    context: Context = None,
    optimizer: Annotated[Optimizer, typer.Option(help="DSPy's optimizer of the prompts.")] = "random_search",
    examples: Annotated[
        int, typer.Option(min=10, help="Training examples that the optimizer is given.")
    ] = 100,
) -> None:
    """Prompts and weights, each alone and in every order: scores, synergy, cost."""
    from trainer.studies import order as orders
    from trainer.studies.prompts import Settings

    with _opened("order", folder, limit, context) as study:
        settings = Settings(optimizer, examples)
        plain, full = orders.quoted(study)
        out.print(f"teacher, with the prompts as written: {plain.sentence()}", highlight=False)
        out.print(
            f"teacher, if the prompts gain {orders.LABELLED} demonstrations: {full.sentence()}",
            highlight=False,
        )
        out.print(orders.workload(study, settings).sentence(), highlight=False)
        budget = study.run.task.settings.teacher.budget_usd
        out.print(
            f"budget ${budget:g}; steps and answers that are there already are not taken or paid again; {LOCAL}",
            style="dim",
        )
        if not dry_run:
            _finish(study, orders.run(study, settings))


@app.command(
    epilog="Examples: homestill study demos my-task · homestill study demos my-task --most 4 --limit 100"
)
def demos(
    folder: TaskArgument = Path(),
    *,
    dry_run: DryRun = False,
    limit: Limit = None,
    context: Context = None,
    most: Annotated[int, typer.Option(min=1, max=64, help="Most demonstrations in a prompt.")] = 8,
) -> None:
    """Scores of base and student with 0, 1, 2 ... demonstrations in the prompt, and the efficiency ratio."""
    from trainer.studies import demos as demonstrations

    with _opened("demos", folder, limit, context) as study:
        _quote(study, demonstrations.systems(study, most))
        if not dry_run:
            _finish(study, demonstrations.run(study, most))


@app.command(
    epilog="Examples: homestill study instructions my-task · homestill study instructions my-task --variants texts.yaml"
)
def instructions(
    folder: TaskArgument = Path(),
    *,
    dry_run: DryRun = False,
    limit: Limit = None,
    context: Context = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            help="YAML: a name and a text for each variant; the task's instructions.yaml by default."
        ),
    ] = None,
) -> None:
    """Scores of base and student with short, written and multi-step instructions."""
    from trainer.studies import instructions as texts

    with _opened("instructions", folder, limit, context) as study:
        given = texts.variants(study, variants)
        _quote(study, texts.systems(study, given))
        if not dry_run:
            _finish(study, texts.run(study, given))


@app.command(epilog="Example: homestill study forgetting my-task --general general.jsonl")
def forgetting(
    general: Annotated[
        Path,
        typer.Option(help='JSON lines of {"messages": [...]} or {"question", "answer"}.', show_default=False),
    ],
    folder: TaskArgument = Path(),
    *,
    dry_run: DryRun = False,
) -> None:
    """General ability before and after fine-tuning: next-token score and loss, and their drop."""
    from trainer.studies import forgetting as general_set

    with _opened("forgetting", folder, None, None) as study:
        rows = general_set.read(general)
        left = general_set.open_rows(study, rows)
        out.print(
            f"{len(rows)} conversations, {left} of {2 * len(rows)} still to be judged, on this machine: nothing is paid",
            highlight=False,
        )
        if not dry_run:
            _finish(study, general_set.run(study, rows, name=general.name), len(rows))


@contextmanager
def _opened(name: str, folder: Path, limit: int | None, context: int | None) -> Iterator[Study]:
    """The study of the task's finished run, its folder locked against a second process."""
    from trainer.studies import study as studies

    loaded = task.load(folder)
    home = Home.from_environment(os.environ)
    home.create()
    store = Store.open(home.database_url)
    place = home.root / "studies" / loaded.name / name
    try:
        with locked(place, loaded.name):
            current = pipeline.open_run(loaded, home, store, os.environ)
            run = studies.finished(current)
            if name != "forgetting" and any(one.settings.student.predictor for one in (loaded, run.task)):
                raise TaskError([ONE_PREDICTOR])
            if run.folder != current.folder:
                err.print(f"run {current.name} is not finished; studying run {run.name}", highlight=False)
            yield studies.Study(name, run, place, limit=limit, context=context)
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here", highlight=False)
        raise
    finally:
        store.close()


def _quote(study: Study, systems: list[System]) -> None:
    """What is still to be asked, and for how long."""
    from trainer.studies.study import minutes, open_questions

    examples = study.examples()
    left = open_questions(study, systems, examples, study.rows)
    out.print(
        f"{len(systems)} systems, {len(examples)} examples: {left} of {len(systems) * len(examples)} answers are "
        f"missing, about {minutes(study, systems, examples):.0f} minutes; {LOCAL}",
        highlight=False,
    )


def _finish(study: Study, outcome: Outcome, examples: int | None = None) -> None:
    from trainer.studies import report

    page = report.write(study, outcome, len(study.examples()) if examples is None else examples)
    for notice in report.notices(study):
        out.print(notice, style="yellow", highlight=False)
    for table in report.terminal(outcome):
        out.print(table)
    out.print(outcome.finding, highlight=False, markup=False)
    for note in outcome.notes:
        out.print(note, style="dim", highlight=False, markup=False)
    out.print(f"report: {page}", highlight=False, soft_wrap=True)
