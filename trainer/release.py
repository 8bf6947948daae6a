"""Release: a folder with everything that serving needs, signed off by hashes, and the gate before `current`.

A release is assembled in a hidden sibling and renamed when it is whole, so none is ever seen half
written. Its version ends in a hash of its content: the same outcome gives the same release again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from serve import release as releases
from serve.interface import Interface, describe
from serve.manifest import Manifest
from serve.release import INTERFACE, Release, ReleaseInvalid
from trainer.errors import ReleaseError, TeacherError
from trainer.program import load as load_program
from trainer.reporting import report, verdict
from trainer.reporting.manifest import SPLITS, split_file
from trainer.reporting.manifest import manifest as make_manifest
from trainer.runs import Home, Run, read_json, sha256_file, write_json, write_text
from trainer.runtimes.parity import ALLOWED_DROP, too_much_lost
from trainer.seam import translated
from trainer.sources import sources
from trainer.statistics.scores import Interval, difference_interval
from trainer.teacher.prices import price_of

VERSION = 2
"""Raise it when the same inputs shall make another release."""
INPUT_FILES = (
    "capture/program.json",
    "train/summary.json",
    "export/summary.json",
    "register/registration.json",
    "register/parity.json",
    "evaluate/summary.json",
    "certify/router.json",
    "certify/summary.json",
)

Clock = Callable[[], datetime]


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about a release, and against which it was compared."""

    reasons: list[str]
    """Why it was not promoted; empty when it was."""
    compared_with: str | None
    note: str = ""

    @property
    def promoted(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        return {"promoted": self.promoted, **vars(self)}


def inputs(run: Run) -> dict[str, Any]:
    """What the outcome depends on."""
    files = [run.folder / name for name in INPUT_FILES] + [split_file(run, name) for name in SPLITS]
    return {
        "version": VERSION,
        "report": report.VERSION,
        "settings": run.task.settings.model_dump(mode="json", exclude={"retrain"}),
        "code": run.task.code_sha256,
        "files": {file.relative_to(run.folder).as_posix(): sha256_file(file) for file in files},
    }


def run(run: Run, *, clock: Clock = lambda: datetime.now(UTC), render: report.Render = report.render) -> None:
    """Assemble the release, or find the one with the same content, and promote it if the gate lets it pass.

    Writes release/summary.json: version, promoted, reasons, compared_with, folder.

    Args:
        clock: the time that the version is named after.
        render: makes report.html.

    Raises:
        ReleaseError: a file is missing, or the release with this content was altered on disk.
    """
    folder = run.home.releases(run.task.name)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.partial"):
        _delete(partial)
    made, judged = _existing_or_new(run, folder, clock, render)
    if judged.promoted:
        _make_current(folder, made.version)
    found = {"version": made.version, "folder": str(made.folder), **judged.to_json()}
    write_json(run.stage("release") / "summary.json", found)


def gate(new: Manifest, old: Manifest | None, parity: Mapping[str, Any]) -> list[str]:
    """Why a release may not replace the current one; nothing when it may.

    Args:
        old: the current release, where there is a sound one.
        parity: register/parity.json.
    """
    reasons = _parity_faults(parity)
    if old is None:
        return reasons
    drop = difference_interval(_interval(new, "student"), _interval(old, "student"))
    if drop.high < 0:
        reasons.append(
            f"the student scores {new.scores['student'].mean:.3f}, that of {old.version} scores "
            f"{old.scores['student'].mean:.3f}: worse by more than chance "
            f"(difference {drop.mean:+.3f}, 95 % interval {drop.low:+.3f} to {drop.high:+.3f})"
        )
    if old.router.certified and not new.router.certified:
        reasons.append(f"nothing could be certified, and {old.version} is certified")
    return reasons


def rollback(home: Home, task: str, version: str | None = None) -> str:
    """Make the promoted release before the current one current, or the one that is named.

    Returns:
        The version that is current now.

    Raises:
        ReleaseError: there is none, or its files are not those that were released.
    """
    folder = home.releases(task)
    target = version or _before_current(folder, task)
    known = releases.versions(folder)
    if target not in known:
        listed = ", ".join(known) or "none"
        raise ReleaseError(f"{task} has no release {target}; there are: {listed}")
    _load(folder / target)  # its hashes, before anything serves it
    _make_current(folder, target)
    return target


@dataclass(frozen=True)
class Outcome:
    """What a run ends with, for people."""

    title: str
    rows: list[list[str]]
    """Of each system: name, score, 95 % interval, rows, median latency (ms), API dollars per 1,000."""
    lines: list[str]


def outcome(run: Run) -> Outcome:
    """The table and the sentences that a finished run is shown with.

    Raises:
        ReleaseError: the release was altered or removed since.
    """
    made = read_json(run.stage("release") / "summary.json")
    release = _load(Path(made["folder"]))
    manifest = release.manifest
    certificate = read_json(run.stage("certify") / "summary.json")["certificate"]
    lines = [verdict.STAND_IN] if manifest.teacher.stand_in else []
    lines.append(verdict.sentence(manifest, certificate))
    if not manifest.router.certified:
        lines.append(certificate["reason"])
    state = "is current" if _current_version(release.folder.parent) == release.version else "is not current"
    lines += [
        f"release {release.version} {state}",
        *(f"not promoted: {reason}" for reason in made["reasons"]),
    ]
    return Outcome(run.task.name, _outcome_rows(manifest), [*lines, f"report: {release.report}"])


def _outcome_rows(manifest: Manifest) -> list[list[str]]:
    latency = {"teacher": manifest.latency_ms["teacher"], "student": manifest.latency_ms["local"]}
    cost = {"student": 0.0, "base": 0.0} | manifest.cost_per_1k_usd  # older releases name two systems
    return [
        [
            name,
            f"{score.mean:.3f}",
            f"{score.low:.3f} to {score.high:.3f}",
            str(score.n),
            f"{latency[name].p50:.0f}" if name in latency else "",
            f"{cost[name]:.2f}",
        ]
        for name, score in manifest.scores.items()
    ]


def _existing_or_new(run: Run, folder: Path, clock: Clock, render: report.Render) -> tuple[Release, Verdict]:
    now = clock().astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    draft = folder / f".{now}-{os.getpid()}.partial"
    draft.mkdir()
    try:
        _fill(run, draft)
        files = _digests(draft)
        content = releases.content_hash(files)
        same = [name for name in releases.versions(folder) if name.endswith(content)]
        if same:
            made = _load(folder / same[-1])
            judged = _judge(run, made.manifest, folder)
            _write_verdict(folder, made.folder, judged)
            return made, judged
        manifest = make_manifest(run, f"{now}-{content}", files)
        judged = _judge(run, manifest, folder)
        page = render(run, manifest, judged.reasons)
        return _publish(draft, manifest, judged, page), judged
    finally:
        _delete(draft)


def _fill(run: Run, draft: Path) -> None:
    """Everything of a release but report and manifest."""
    apart = run.task.settings.student.deliver == "adapter"
    for name in ("base.gguf", "adapter.gguf") if apart else ("model.gguf",):
        _link(run, run.stage("export") / name, draft / name)  # all releases on one base hold the same file
    shutil.copyfile(run.stage("certify") / "router.json", draft / "router.json")
    neighbours = run.stage("certify") / "neighbours.npz"
    if neighbours.is_file():
        shutil.copyfile(neighbours, draft / "neighbours.npz")
    shutil.copyfile(run.stage("capture") / "program.json", draft / "program.json")
    settings = run.task.settings.model_dump(mode="json", exclude_none=True)
    with suppress(TeacherError):  # the endpoint has no price list of its own; an unknown price stays unknown
        settings["teacher"]["price_per_1m"] = price_of(run.task.settings.teacher).model_dump()
    write_text(draft / "task.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    folder = run.task.folder
    for source in sources(folder, [run.task.source("program")[0], run.task.source("metric")[0]]):
        target = draft / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_text(draft / INTERFACE, _interface(run).text())


def _interface(run: Run) -> Interface:
    """What the program takes and gives: as its signatures say, and as it answered with the teacher."""
    program = load_program(run.task, run.stage("capture") / "program.json")
    system = read_json(run.stage("capture") / "summary.json")["system"]
    answers = run.store.answers(system).values()
    return describe(
        program.module, run.task.settings.inputs, [each.outputs for each in answers if not each.error]
    )


def _link(run: Run, source: Path, target: Path) -> None:
    """A hard link where the disk allows it: weights are large, and neither side writes into the file."""
    try:
        os.link(source, target)
    except OSError:
        run.need_disk(source.stat().st_size, "the release's model")
        shutil.copyfile(source, target)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): releases.file_digest(path) for path in files}


def _publish(draft: Path, manifest: Manifest, judged: Verdict, page: str) -> Release:
    (draft / "report.html").write_text(page, encoding="utf-8")
    files = manifest.files | {"report.html": releases.file_digest(draft / "report.html")}
    manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
    write_text(draft / "manifest.json", manifest.text())
    write_json(draft / "gate.json", judged.to_json())
    folder = draft.with_name(manifest.version)
    draft.rename(folder)
    return _load(folder)


def _judge(run: Run, manifest: Manifest, folder: Path) -> Verdict:
    parity = read_json(run.stage("register") / "parity.json")
    try:
        old = releases.current(folder)
    except ReleaseInvalid as error:
        # a current release that cannot be served is no reason to keep a new one out
        note = f"the current release is unusable and was not compared: {error.faults[0]}"
        return Verdict(gate(manifest, None, parity), None, note)
    if old is None or old.version == manifest.version:
        return Verdict(gate(manifest, None, parity), None)
    return Verdict(gate(manifest, old.manifest, parity), old.version)


def _write_verdict(folder: Path, release: Path, judged: Verdict) -> None:
    partial = folder / ".gate.json.partial"  # beside the release: a reader must see no extra file in it
    write_json(partial, judged.to_json())
    partial.replace(release / "gate.json")


def _parity_faults(parity: Mapping[str, Any]) -> list[str]:
    if parity.get("fault"):
        return [f"parity is broken: {parity['fault']}"]
    if not parity["prompt_tokens_equal"]:
        return ["parity is broken: the served model does not get the tokens that it was trained on"]
    delta = parity["metric_delta"] or 0.0
    if too_much_lost(delta, parity.get("evidence", {}).get("answers", {}).get("n", math.inf)):
        return [
            f"parity is broken: served, the model scores {-delta:.3f} lower than its trained weights; "
            f"at most {ALLOWED_DROP} is allowed"
        ]
    return []


def _interval(manifest: Manifest, system: str) -> Interval:
    score = manifest.scores[system]
    return Interval(score.mean, score.low, score.high)


def _load(folder: Path) -> Release:
    with translated():
        return releases.load(folder)


def _make_current(folder: Path, version: str) -> None:
    write_text(folder / "current", version + "\n")


def _current_version(folder: Path) -> str | None:
    with translated():
        return releases.current_version(folder)


def _before_current(folder: Path, task: str) -> str:
    in_use = _current_version(folder)
    if in_use is None:
        raise ReleaseError(f"{task} has no release in use; make one with: homestill run {task}")
    known: Sequence[str] = releases.versions(folder)
    earlier = [name for name in known if name < in_use and _promoted(folder / name)]
    if not earlier:
        raise ReleaseError(f"{task} has no promoted release before {in_use}; name one of: {', '.join(known)}")
    return earlier[-1]


def _promoted(release: Path) -> bool:
    """Whether the gate let it through; a release whose verdict is missing or damaged counts as refused."""
    try:
        return bool(json.loads((release / "gate.json").read_text(encoding="utf-8"))["promoted"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
