"""One fine-tuning of DSPy's rows: a run without a task folder, through the stages train, export and register."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer import child, pipeline, prepare
from trainer import export as exporting
from trainer import register as registering
from trainer.errors import BusyError, TrainError, told
from trainer.gguf_files import PACKAGES, Maker, cached_base
from trainer.progress import progress
from trainer.provider.models import Models
from trainer.provider.rows import Row
from trainer.runs import (
    Home,
    Run,
    holder,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_json,
    write_json,
    write_jsonl,
)
from trainer.runtimes.local import RECORD, LocalModel, Registration, Runtime, record, recorded
from trainer.runtimes.parity import Prompt, Tokens, Vocabulary, rendered_as_trained
from trainer.settings import StudentSettings, TaskSettings, TrainSettings
from trainer.task import Task
from trainer.template import Template
from trainer.traces import Store
from trainer.training import base as bases

PROVEN = 64
"""Training prompts that the server must render as they were trained."""
TOKENIZED = 256
NOT_HERE = {"base", "train", "predictor"}
"""Keys of `student` that a provider does not take: the weights and the rows are given to it."""
WAIT_S = 0.5
"""Between two looks whether another process has ended its turn."""
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
log = logging.getLogger("homestill.provider")


def student_settings(base: str, *given: Mapping[str, Any]) -> StudentSettings:
    """The settings of `student` in task.yaml from flat keys, those of `student.train` among them.

    Args:
        base: folder or hub name of the weights that are fine-tuned.
        given: later mappings win; None values are taken as not given.

    Raises:
        TrainError: with every unknown key and every value out of range.
    """
    for one in given:
        if not isinstance(one, Mapping):
            raise TrainError(f'the settings are {one!r}; give a mapping, such as {{"epochs": 3}}')
    values = {key: value for one in given for key, value in one.items() if value is not None}
    if isinstance(replay := values.get("replay"), Mapping) and isinstance(replay.get("data"), str | Path):
        values["replay"] = {**replay, "data": str(Path(replay["data"]).expanduser().resolve())}
    recipe, own = set(TrainSettings.model_fields), set(StudentSettings.model_fields) - NOT_HERE
    faults = [
        f"{key} is no setting; use one of {', '.join(sorted(own | recipe))}"
        for key in sorted(values.keys() - recipe - own, key=str)
    ]
    known = {key: value for key, value in values.items() if key in own}
    try:
        student = StudentSettings.model_validate(
            {**known, "base": base, "train": {key: value for key, value in values.items() if key in recipe}}
        )
    except ValidationError as error:
        faults += [
            f"{'.'.join(map(str, one['loc'][-1:])) or 'student'} is {one['input']!r}: {one['msg']}"
            for one in error.errors()
        ]
    if faults:
        raise TrainError("\n".join(faults))
    return student


@dataclass(frozen=True)
class Workshop:
    """Makes models from rows, and knows those that it made.

    Everything lies in `runs/<name>/` of the home: a folder for each set of rows and settings.
    """

    name: str
    home: Home
    environment: Mapping[str, str]
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    """Set, it ends what is being made."""

    def __post_init__(self) -> None:
        faults = []
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            faults.append(
                f"name is {self.name!r}; use a-z, 0-9 and '-', at most 40 characters, the first no '-'"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            faults.append(f"seed is {self.seed!r}; use a whole number from 0 on")
        if faults:
            raise TrainError("\n".join(faults))

    def check(self, models: Models) -> None:
        """Raise HomestillError unless models can be converted and registered."""
        exporting.converter(self.environment)
        models.check()

    def tune(self, rows: Sequence[Row], student: StudentSettings, models: Models) -> Registration:
        """Train, export and register; what was done before for the same rows and settings is kept.

        Raises:
            HomestillError: as the stages do.
        """
        self.check(models)  # now rather than after the training
        run = self.run(student, partial(_tuned_folder, rows))
        curated = run.stage("curate") / "train.jsonl"
        if not curated.exists():
            write_jsonl(curated, list(rows))
        log.warning("fine-tuning of %s on %d rows, in %s", student.base, len(rows), run.folder)
        stages = [pipeline.stage("train"), pipeline.stage("export")]
        return _made(
            run, [*stages, _register(models.runtime, lambda: registering.local_models(run)[0])], models
        )

    def base(self, student: StudentSettings, models: Models) -> Registration:
        """The base itself as GGUF, registered.

        Raises:
            HomestillError: as export and register do.
        """
        models.check()
        run = self.run(student, _base_folder)
        export = pipeline.Stage("export", _base_inputs, _export_base)
        return _made(run, [export, _register(models.runtime, partial(_base, run))], models)

    def find(self, name: str) -> Registration | None:
        """The registration of a model that was made here and whose files are there."""
        found = (one for one, _ in self._records() if one.name == name)
        return next((one for one in found if one.gguf and Path(one.gguf).is_file()), None)

    def weights(self, name: str) -> Path | None:
        """The merged weights of a model that was fine-tuned here."""
        folders = (folder / "train" / "model" for one, folder in self._records() if one.name == name)
        return next((folder for folder in folders if folder.is_dir()), None)

    def names(self, name: str) -> bool:
        """Whether the name is one of those that are given to tuned models here."""
        return bool(re.fullmatch(f"{self.name}:[0-9a-f]{{12}}", name))

    def max_tokens(self, name: str) -> int | None:
        """How long the answers of a model were meant to be that was made here."""
        folders = (folder for one, folder in self._records() if one.name == name)
        found = next(folders, None)
        return int(read_json(found / "task.json")["settings"]["student"]["max_tokens"]) if found else None

    def run(self, student: StudentSettings, folder: Callable[[Run], str]) -> Run:
        """A run in a folder of the given name; the task's own files are not there, and no stage used here asks for them.

        Args:
            folder: its name, from a run that has none yet.
        """
        settings = TaskSettings(
            name=self.name,
            program="rows.py:none",
            metric="rows.py:none",
            data="curate/train.jsonl",
            inputs=["messages"],
            student=student,
            seed=self.seed,
        )
        runs = self.home.runs(self.name)
        try:
            self.home.create()
            runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(
                f"home is {self.home.root}, where no run can be made ({told(error)}); give a folder of your own"
            ) from error
        task, store = Task(runs, settings), Store.open("sqlite://")
        bare = Run(task, self.home, store, runs, self.environment, stop=self.stop)
        place = runs / folder(bare)
        place.mkdir(exist_ok=True)
        if not (place / "task.json").exists():
            write_json(place / "task.json", {"folder": None, "settings": settings.model_dump(mode="json")})
        return replace(bare, task=Task(place, settings), folder=place)

    def _records(self) -> Iterator[tuple[Registration, Path]]:
        for file in sorted(self.home.runs(self.name).glob(f"*/{RECORD}")):
            folder = file.parents[1]
            yield from ((one, folder) for one in recorded(folder).values())


def _tuned_folder(rows: Sequence[Row], run: Run) -> str:
    """A run's folder is named by the content that decides its outcome, wherever that lies: another base at the
    same path is another run."""
    settings = run.task.settings
    content = [bases.sha256(bases.resolve(run))]
    if settings.student.train.replay:
        content.append(sha256_file(prepare.replay_file(run.task)))
    recipe = settings.student.model_dump(
        mode="json", exclude={"base": True, "train": {"replay": {"data"}, "processes": True}}
    )
    return sha256_json([rows, content, recipe, settings.seed])[:12]


def _base_folder(run: Run) -> str:
    student = run.task.settings.student
    content = bases.sha256(bases.resolve(run))
    return f"base-{sha256_json([content, student.quantize, student.context, student.max_tokens])[:12]}"


def _made(run: Run, stages: Sequence[pipeline.Stage], models: Models) -> Registration:
    """Run the stages; once more from export on where what they once made has been removed since."""
    _execute(run, stages)
    made = recorded(run.folder)["model"]
    if not models.has(made.name):
        for name in ("export", "register"):
            (run.folder / name / "stage.json").unlink(missing_ok=True)
        _execute(run, stages)
    return made


def _execute(run: Run, stages: Sequence[pipeline.Stage]) -> None:
    """Run what is left of the stages, when nobody else runs one of this name; where nothing is, nobody is waited for."""
    waiting = False
    while left := _left(run, stages):
        try:
            pipeline.execute(run, map(_stoppable, left))
        except BusyError:
            process, other = holder(run.folder.parent)
            if process and not waiting:
                log.warning("%s waits for %s, which process %s is making", run.name, other, process)
            waiting = True
            time.sleep(WAIT_S)
            run.go_on()


def _stoppable(stage: pipeline.Stage) -> pipeline.Stage:
    def act(run: Run) -> None:
        run.go_on()
        stage.run(run)

    return replace(stage, run=act)


def _left(run: Run, stages: Sequence[pipeline.Stage]) -> list[pipeline.Stage]:
    """The stages that are not done, and register after any of them or where the runtime is another.

    What is done stays, whatever has been upgraded since: the model may be in use, and this is its only copy.
    """
    *making, register = stages
    states = pipeline.status(run.folder)
    left = [one for one in making if states[one.name] != "done"]
    return [] if not left and pipeline.up_to_date(run, register) else [*left, register]


def _register(local: Runtime, model: Callable[[], LocalModel]) -> pipeline.Stage:
    """The register stage without a program: the model is servable, and renders its prompts as trained."""

    def inputs(run: Run) -> dict[str, Any]:
        made = model()
        # the run's own: what another run once registered may have been removed since
        return {
            "run": run.name,
            "name": made.name,
            "runtime": local.kind,
            "url": getattr(local, "url", None),
        }

    def act(run: Run) -> None:
        made = model()
        folder = run.stage("register")
        with registering.taken_back(local, [made.name], folder):
            registered = local.register(made)
            evidence = _prove(run, made, registered, local)
        write_json(folder / "parity.json", evidence)
        record(run.folder, {"model": registered})

    return pipeline.Stage("register", inputs, act)


def _prove(run: Run, model: LocalModel, registered: Registration, local: Runtime) -> dict[str, Any]:
    """Training text against the GGUF's tokenizer, prompts as served against prompts as trained; every token."""
    from transformers import AutoTokenizer

    trained, rows_file = run.folder / "train" / "model", run.folder / "curate" / "train.jsonl"
    rows = read_jsonl(rows_file) if rows_file.exists() else []
    folder = trained if trained.is_dir() else bases.resolve(run)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fitting = [
        Prompt(row["example"], row["predictor"], row["messages"])
        for row in rows
        if len(model.template.prompt_ids(tokenizer, row["messages"])) < model.context
    ]
    if len(fitting) < len(rows):
        left = len(rows) - len(fitting)
        log.warning("%d of %d prompts do not fit into context %d", left, len(rows), model.context)
    with closing(Vocabulary(model.gguf)) as vocabulary:
        tokens = Tokens(tokenizer, model.template, vocabulary, model.context)
        compared = tokens.training(rows[:TOKENIZED])
        with local.serving(registered) as endpoint:
            rendered_as_trained(tokens, local, endpoint, fitting[:PROVEN])
    return {"prompt_tokens_equal": True, "tokens": compared, "rendered_prompts": len(fitting[:PROVEN])}


def _base_inputs(run: Run) -> dict[str, Any]:
    kind = run.task.settings.student.quantize
    versions = bases.versions(*PACKAGES)
    return {"base": bases.sha256(bases.resolve(run)), "quantize": kind, "versions": versions}


def _export_base(run: Run) -> None:
    """Write export/base.gguf, from the cache that export keeps, and export/summary.json."""
    from transformers import AutoTokenizer

    folder, base, kind = run.stage("export"), bases.resolve(run), run.task.settings.student.quantize
    template = Template.freeze(AutoTokenizer.from_pretrained(base, local_files_only=True))
    cached = cached_base(run.home.cache, base, kind, template)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if not cached.exists():
        run.need_disk(4 * bases.weight_bytes(base) + 50_000_000, "export")
    with progress("exporting", 2) as advance:
        maker = Maker(
            llama_cpp=exporting.converter(run.environment),
            kind=kind,
            work=work,
            environment=child.environment(run.environment),
            advance=advance,
        )
        maker.make_base(base, folder / "base.gguf", template, cached)
    about = {"sha256": sha256_file(folder / "base.gguf"), "quantization": kind}
    write_json(folder / "summary.json", {"base": about, "template": template.to_json()})
    shutil.rmtree(work)


def _base(run: Run) -> LocalModel:
    exported, student = read_json(run.folder / "export" / "summary.json"), run.task.settings.student
    return LocalModel.of(
        run.task.name,
        "base",
        gguf=run.folder / "export" / "base.gguf",
        sha256=exported["base"]["sha256"],
        template=Template.from_json(exported["template"]),
        context=student.context,
        max_tokens=student.max_tokens,
    )
