"""In which order do prompt optimisation and fine-tuning help most?

A recipe is a word of two letters: `p` optimises the prompts for the model that stands, `w` fine-tunes the
base on the teacher's answers to the prompts that stand. Every prefix of a recipe is a recipe, so each
step's outcome is scored and used again by all recipes that begin with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer import pipeline
from trainer.runs import Run, read_json, sha256_json, write_json
from trainer.runtimes.local import Registration
from trainer.splits import assigned
from trainer.statistics.scores import Interval, mean_interval
from trainer.studies import pictures, prompts, recipes
from trainer.studies.prompts import Settings
from trainer.studies.recipes import Execute
from trainer.studies.report import Outcome, Picture, Table, percent, points
from trainer.studies.study import Study, System, answered, overflowed, paired_difference, scores, unfit
from trainer.teacher import quote as quotes
from trainer.teacher.quote import Quote
from trainer.traces import Answer

VERSION = 1
RECIPES = ("", "p", "w", "pw", "wp", "pwp")
NAMES = {
    "": "base",
    "p": "prompt only",
    "w": "fine-tune only",
    "pw": "p → w",
    "wp": "w → p",
    "pwp": "p → w → p",
}
_LETTERS = {"p": "prompts", "w": "weights"}
LABELLED = 16
"""Demonstrations that DSPy's optimizers put into a prompt at most, for the upper bound of the cost."""


@dataclass(frozen=True)
class Point:
    """Where a recipe has led: a model, the program's state, and what the way there took."""

    registration: Registration
    state: Path | None = None
    usd: float = 0.0
    seconds: float = 0.0
    unchanged: bool = False
    """The last step found no better prompts than those that stood."""


def run(study: Study, settings: Settings, execute: Execute = pipeline.execute) -> Outcome:
    """Take every step, score every recipe.

    Args:
        execute: runs the stages of a weights step.

    Raises:
        HomestillError: as the steps do; run again, it goes on from there.
    """
    points = reach(study, settings, execute)
    systems = [_system(study, recipe, point) for recipe, point in points.items()]
    found = answered(study, systems, study.examples())
    return outcome({recipe: found[NAMES[recipe]] for recipe in points}, points, settings, study.seed)


def reach(study: Study, settings: Settings, execute: Execute) -> dict[str, Point]:
    """Every recipe's point; a step that was taken before is not taken again."""
    found = {"": Point(study.registration("base"))}
    for recipe in RECIPES[1:]:
        before = found[recipe[:-1]]
        if recipe[-1] == "p":
            found[recipe] = _prompts(study, settings, recipe, before)
        else:
            found[recipe] = _weights(study, recipe, before, execute)
    return found


def quoted(study: Study) -> tuple[Quote, Quote]:
    """What the weights steps will ask of the teacher at most: with the prompts as written, and with demonstrations.

    The fine-tuning of the prompts as written costs nothing where the studied run is that.
    """
    asked = recipes.examples(study.run)
    plain = study.program()
    first = [] if own(study.run) else asked
    full = study.program()
    for _, predictor in full.module.named_predictors():
        predictor.demos = [dict(example.values) for example in asked[:LABELLED]]
    return quotes.quote(plain, [*first, *asked], []), quotes.quote(full, [*first, *asked], [])


@dataclass(frozen=True)
class Workload:
    """What this machine has to do at most, if no step was taken before."""

    answers: int
    tunings: int
    seconds: float
    """Of one fine-tuning, from curate to register, as the studied run took it."""

    def sentence(self) -> str:
        return (
            f"this machine: about {self.answers:,} local answers, {self.tunings} times fine-tuning at about "
            f"{self.seconds / 60:.0f} minutes each, as the studied run's was (longer prompts take longer)"
        )


def workload(study: Study, settings: Settings) -> Workload:
    """The scoring of every recipe, the prompt steps' searches, and the weights steps."""
    train = min(settings.examples, len(assigned(study.run.task).splits["train"]))
    searches = sum(recipe.endswith("p") for recipe in RECIPES)
    tunings = sum(recipe.endswith("w") for recipe in RECIPES) - own(study.run)
    answers = searches * prompts.calls(train) + len(RECIPES) * len(study.examples())
    return Workload(answers, tunings, recipes.seconds(study.run, recipes.STAGES))


def own(run: Run) -> bool:
    """Whether the run is the recipe `w`: made of the task as it stands, fine-tuned on the prompts as written."""
    return run.task.settings.teacher.optimizer == "none" and run.name == pipeline.run_name(run.task)


def outcome(
    found: Mapping[str, Sequence[Answer]], reached: Mapping[str, Point], settings: Settings, seed: int
) -> Outcome:
    """The table, from every recipe's answers to the same examples in one order."""
    values = {recipe: scores(answers) for recipe, answers in found.items()}
    means = {recipe: mean_interval(values[recipe], seed=seed) for recipe in found}
    single = max((recipe for recipe in found if len(recipe) == 1), key=lambda recipe: means[recipe].mean)
    synergy = {
        recipe: paired_difference(values[recipe], values[single], seed) for recipe in found if len(recipe) > 1
    }
    best = max(synergy, key=lambda recipe: means[recipe].mean)
    rows = [
        [
            NAMES[recipe],
            *percent(means[recipe]),
            points(synergy[recipe]) if recipe in synergy else "",
            *_spent(reached[recipe]),
            str(overflowed(found[recipe])),
        ]
        for recipe in found
    ]
    picture = pictures.intervals(
        "Score of each recipe",
        [NAMES[recipe] for recipe in found],
        [pictures.Series("score", list(means.values()))],
    )
    return Outcome(
        title="Order of prompt optimisation and fine-tuning",
        finding=_sentence(best, single, synergy[best]),
        table=Table(
            ("Recipe", "Score", "95 % interval", "Synergy, points", "USD", "Minutes", "Did not fit"),
            rows,
            marked=NAMES[max(means, key=lambda recipe: means[recipe].mean)],
        ),
        meaning=_meaning(settings),
        pictures=[
            Picture(
                picture, "Mean score with its 95 % interval; p: prompts optimised, w: weights fine-tuned."
            )
        ],
        notes=[*_unchanged(reached), *unfit(map(overflowed, found.values()))],
        more={"Each step": _steps(reached)},
        figures=_figures(means, synergy, reached, single, best),
    )


def _system(study: Study, recipe: str, point: Point) -> System:
    role: Literal["base", "student"] = "student" if "w" in recipe else "base"
    return System(NAMES[recipe], role, point.registration, study.program(point.state))


def _weights(study: Study, recipe: str, before: Point, execute: Execute) -> Point:
    plain = study.program().state
    given = read_json(before.state) if before.state else plain
    # where the prompts are as written, the studied run may be this step
    known = own(study.run) and given == plain
    trained = study.run if known else recipes.train(study, recipe, given, execute)
    usd, seconds = recipes.spent(trained)
    made = recipes.student(study, trained)
    return Point(made, before.state, before.usd + usd, before.seconds + seconds)


def _prompts(study: Study, settings: Settings, recipe: str, before: Point) -> Point:
    """Optimise the program's prompts for the model that stands; kept for good once it is done."""
    program = study.program(before.state)
    served = before.registration
    model = [served.name, served.sha256, served.context]
    key = sha256_json([VERSION, asdict(settings), model, program.hash, study.run.task.data_sha256])
    folder = study.folder / "prompts" / f"{recipe}-{key[:8]}"
    if not (folder / "step.json").is_file():
        started = time.monotonic()
        state, usd = prompts.optimized(study, program, settings, served, folder)
        write_json(folder / "state.json", state)
        write_json(folder / "step.json", {"usd": usd, "seconds": round(time.monotonic() - started, 1)})
    step, state_file = read_json(folder / "step.json"), folder / "state.json"
    return Point(
        served,
        state_file,
        usd=before.usd + step["usd"],
        seconds=before.seconds + step["seconds"],
        unchanged=read_json(state_file) == program.state,
    )


def _step(reached: Mapping[str, Point], recipe: str) -> Point:
    """What the last step alone took."""
    if not recipe:
        return reached[recipe]
    here, before = reached[recipe], reached[recipe[:-1]]
    return replace(here, usd=here.usd - before.usd, seconds=here.seconds - before.seconds)


def _unchanged(reached: Mapping[str, Point]) -> list[str]:
    names = [f"“{NAMES[recipe]}”" for recipe, point in reached.items() if point.unchanged]
    return (
        [f"The optimizer found nothing better than the prompts that stood in {', '.join(names)}."]
        if names
        else []
    )


def _steps(reached: Mapping[str, Point]) -> Table:
    rows = [
        [f"{NAMES[recipe[:-1]]}, then {_LETTERS[recipe[-1]]}", *_spent(_step(reached, recipe))]
        for recipe in reached
        if recipe
    ]
    return Table(("Step", "USD", "Minutes"), rows)


def _spent(point: Point) -> tuple[str, str]:
    return f"{point.usd:.2f}", f"{point.seconds / 60:.1f}"


def _sentence(best: str, single: str, synergy: Interval) -> str:
    both = f"“{NAMES[best]}”, the best combination,"
    if synergy.low > 0:
        return f"{both} beats the better single step (“{NAMES[single]}”) by {100 * synergy.mean:.1f} points."
    if synergy.high < 0:
        return (
            f"{both} falls {-100 * synergy.mean:.1f} points behind the better single step, “{NAMES[single]}”."
        )
    return (
        f"No combination beats “{NAMES[single]}” by more than chance may: the best, “{NAMES[best]}”, stands at "
        f"{100 * synergy.mean:+.1f} points against it."
    )


def _figures(
    means: Mapping[str, Interval],
    synergy: Mapping[str, Interval],
    reached: Mapping[str, Point],
    single: str,
    best: str,
) -> dict[str, Any]:
    return {
        "recipes": {
            NAMES[recipe]: {
                "score": asdict(means[recipe]),
                "synergy": asdict(synergy[recipe]) if recipe in synergy else None,
                "usd": reached[recipe].usd,
                "seconds": reached[recipe].seconds,
                "last_step": {
                    "usd": _step(reached, recipe).usd,
                    "seconds": _step(reached, recipe).seconds,
                },
            }
            for recipe in means
        },
        "best_single": NAMES[single],
        "best_combined": NAMES[best],
        "synergy": asdict(synergy[best]),
    }


def _meaning(settings: Settings) -> dict[str, str]:
    return {
        "base": "The base with the program's prompts as its source has them.",
        "p, prompt only": f"DSPy's {settings.optimizer} on {settings.examples} training examples, with the model that stands "
        "at that step as the one that is optimised; demonstrations are its own good answers and labelled rows.",
        "w, fine-tune only": "The base, fine-tuned by the task's own recipe on the teacher's answers to the training split, "
        "asked with the prompts that stand at that step. Every weights step starts from the base.",
        "Score": "Mean score of the task's metric on the sealed test split, with the greedy answer of the quantised "
        "model. An answer that cannot be read, is cut off or does not fit counts as 0.",
        "Synergy": "The combination's score minus the better single step's (prompt only or fine-tune only), paired by "
        "example, with a 95 % bootstrap interval. The better one is chosen by the same answers, which makes "
        "the synergy look a little smaller than it is.",
        "USD": "The teacher's answers to the training split and to the prompts of parity, whenever they were bought, and "
        "paid judging while prompts were optimised. Local computing is not counted.",
        "Minutes": "Wall time of the recipe's steps on this machine, as far as the process that finished each one worked "
        "on it; of a capture that asked more, the share of those answers. The scoring is not counted.",
    }
