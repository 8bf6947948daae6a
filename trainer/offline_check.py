"""`homestill doctor --offline`: would a day without a network work here, and does anything still call out?

The self-test starts a process with the hooks of `offline_hook`, and without a network where the machine allows
namespaces, which imports what a run imports, asks for the teacher, and starts the local runtime's modules.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer import offline_hook, process, task
from trainer.doctor import Finding
from trainer.errors import ExportError, HomestillError, TaskError
from trainer.runs import Home
from trainer.seam import offline
from trainer.settings import TeacherSettings
from trainer.task import Task
from trainer.teacher.client import make_client

TIMEOUT_S = 600.0
SELF_TEST = """\
import os, sys
import dspy, litellm, transformers, trl, peft, datasets, huggingface_hub
import serve.app, serve.predict_program, trainer.cli, trainer.preflight, trainer.training.sft
from trainer.errors import TeacherError
from trainer.settings import TeacherSettings
from trainer.teacher.client import make_client
try:
    make_client(TeacherSettings(), os.environ)
except TeacherError:
    sys.exit(0)
sys.exit("a client of the teacher was made")
"""


def examine(home: Home, environment: Mapping[str, str]) -> list[Finding]:
    """What an offline day needs, one finding each; `missing` means that it would not work."""
    return [
        _switch(environment),
        _teacher(environment),
        _converter(environment),
        *_tasks(home),
        *self_test(environment),
    ]


def self_test(environment: Mapping[str, str], code: str = SELF_TEST) -> Iterator[Finding]:
    """Run `code` in a watched process and say where it wanted to go."""
    alone = namespaces()
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "attempts.jsonl"
        path = [str(offline_hook.folder_for(log, Path(work))), environment.get("PYTHONPATH", "")]
        switches = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HOMESTILL_OFFLINE": "1"}
        watched = {**environment, **process.QUIET, **switches}  # as every command of ours begins
        done = process.run(
            [*alone, sys.executable, "-c", code], timeout=TIMEOUT_S, environment=watched, folder=Path(work)
        )
        outside = sorted({each["to"] for each in offline_hook.attempts(log) if not each["local"]})
    if done.code:
        yield Finding("self-test", "missing", f"it ended with {done.code}: {done.last_line}")
    elif outside:
        yield Finding(
            "self-test", "missing", f"it tried to reach {', '.join(outside)}; report this as a fault"
        )
    else:
        where = "in a network namespace without a route" if alone else "beside the network"
        yield Finding(
            "self-test", "ok", f"all modules of a run, {where}: no connection and no lookup was tried"
        )
    if not alone:
        yield Finding(
            "isolation",
            "note",
            "no network namespace can be made here: only Python's own sockets were watched",
        )


def namespaces() -> list[str]:
    """The command that runs a program without a network; empty where this machine does not allow it."""
    unshare = shutil.which("unshare")
    if not unshare or process.run([unshare, "-rn", "true"], timeout=10).code:
        return []
    return [unshare, "-rn"]


def _switch(environment: Mapping[str, str]) -> Finding:
    if offline(environment):
        return Finding("HOMESTILL_OFFLINE", "ok", "set: no teacher client is made, hubs are switched off")
    return Finding(
        "HOMESTILL_OFFLINE", "missing", "not set; set HOMESTILL_OFFLINE=1 for every command and container"
    )


def _teacher(environment: Mapping[str, str]) -> Finding:
    try:
        make_client(TeacherSettings(), environment)
    except HomestillError as error:
        return Finding("teacher", "ok", f"no client can be made: {str(error).partition(';')[0]}")
    return Finding("teacher", "missing", "a client of the teacher can be made; set HOMESTILL_OFFLINE=1")


def _converter(environment: Mapping[str, str]) -> Finding:
    from trainer.export import converter

    try:
        return Finding("converter", "ok", str(converter(environment)))
    except ExportError as error:
        return Finding("converter", "missing", str(error))


def _tasks(home: Home) -> Iterator[Finding]:
    """Of every task in the home: is its base here, and what would still have to be bought?"""
    for folder in sorted(
        path for path in (home.root / "tasks").glob("[!.]*") if (path / "task.yaml").is_file()
    ):
        try:
            yield _base(task.load(folder))
        except TaskError as error:
            yield Finding(f"task {folder.name}", "missing", str(error))


def _base(loaded: Task) -> Finding:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = loaded.base_path()
    if Path(name).is_absolute():
        return Finding(f"task {loaded.name}", "ok", f"its base is {name}")
    try:
        return Finding(
            f"task {loaded.name}", "ok", f"its base is {snapshot_download(name, local_files_only=True)}"
        )
    except (LocalEntryNotFoundError, ValueError):
        return Finding(
            f"task {loaded.name}", "missing", f"its base {name} is not in the cache; load it from a bundle"
        )
