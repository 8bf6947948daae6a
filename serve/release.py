"""A release on disk: its manifest, its router, and the check that both are what was signed off.

    releases/<task>/current              a file with the version in use
    releases/<task>/<version>/           manifest.json and the files that it lists with their SHA-256

A release is read whole and checked, or refused whole: `ReleaseInvalid` lists every fault found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 1
VERSION = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")
UNLISTED = frozenset({"manifest.json", "gate.json"})
"""Files of a release that the manifest does not list: itself, and the gate's verdict on it."""
INTERFACE = "interface.json"
NOT_CONTENT = frozenset({"report.html"})
"""Files that hold measured times and so differ between two runs with the same outcome."""


class ReleaseInvalid(Exception):
    """A release cannot be used; `faults` says why, one line each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(faults))


def _plain_path(name: str) -> str:
    parts = name.split("/")
    if not name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f'"{name}" leaves the release; name a file below it')
    return name


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_plain_path)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


PartT = TypeVar("PartT", bound=_Part)


class BaseInfo(_Part):
    """The open model that the student was made from; sha256 of its weights."""

    name: str
    sha256: Digest


class DataInfo(_Part):
    """Rows of each split, and one hash over all of them."""

    train: int
    calibrate: int
    test: int
    sha256: Digest


class TeacherInfo(_Part):
    model: str
    stand_in: bool
    """Not a real API model: reports say so in their first line."""


class ModelInfo(_Part):
    file: FileName
    sha256: Digest
    quantization: str
    ollama: str | None = None
    """The name that it is registered under, where Ollama runs it."""


class Parity(_Part):
    """How the served model compares with the trained weights; None where it was not measured."""

    prompt_tokens_equal: bool
    answers_equal: Share | None = None
    metric_delta: float | None = None
    """Served score minus the score of the 16-bit weights."""


class Score(_Part):
    """Mean score (0..1) over `n` rows with its 95 % interval; failures count as 0."""

    mean: float
    low: float
    high: float
    n: int
    failures: int = 0


class RouterInfo(_Part):
    """What router.json decides, for readers of the manifest."""

    threshold: float | None
    certified: bool
    keep: float
    confidence: float
    local_share: Share


class Latency(_Part):
    """Milliseconds for one example."""

    mean: float | None = None
    p50: float
    p95: float


class Manifest(_Part):
    """manifest.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    task: str
    version: Annotated[str, Field(pattern=rf"^{VERSION.pattern}$")]
    base: BaseInfo
    method: str
    data: DataInfo
    teacher: TeacherInfo
    model: ModelInfo
    parity: Parity
    scores: dict[str, Score]
    """By system: teacher, base, student and, where it was measured, hybrid."""
    router: RouterInfo
    latency_ms: dict[str, Latency]
    cost_per_1k_usd: dict[str, float]
    """US dollars of API cost for 1,000 requests; the local machine's own cost is not in it."""
    software: dict[str, str]
    seed: int
    files: dict[FileName, Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]]

    def text(self) -> str:
        """The manifest as it is written."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"


class Binds(_Part):
    """What a certificate was measured on; it holds for nothing else."""

    model: Digest
    quantization: str
    template: str
    program: str
    adapter: str
    runtime: str


class OutputField(_Part):
    """An output field of a predictor; `labels` where its values are an enum."""

    name: str
    labels: list[str] | None = None


class PredictorPrompt(_Part):
    """The fixed part of one predictor's prompt, by which a request is recognised."""

    name: str
    fingerprint: str
    """SHA-256 of the messages before the last."""
    prefix: str
    suffix: str
    """Fixed start and end of the last message."""
    fields: list[OutputField]


class Sampling(_Part):
    temperature: float
    max_tokens: int
    context: int


class ConfidenceWeights(_Part):
    """A logistic model over `features`, standardised, and its calibration. Read by serve.confidence."""

    model_config = ConfigDict(extra="allow")

    features: list[str]
    mean: list[float]
    scale: list[float]
    weights: list[float]
    bias: float
    calibration: dict[str, Any]

    @model_validator(mode="after")
    def _same_length(self) -> ConfidenceWeights:
        lengths = {len(self.features), len(self.mean), len(self.scale), len(self.weights)}
        if len(lengths) > 1:
            raise ValueError("features, mean, scale and weights differ in length; run certify again")
        return self


class AuditBaseline(_Part):
    """How often local answers that the threshold keeps differ from the teacher's, counted on the test rows."""

    fields: list[str]
    """The output fields that are compared."""
    kept: Annotated[int, Field(ge=0)]
    disagreed: Annotated[int, Field(ge=0)]
    upper: Annotated[float, Field(gt=0, le=1)]
    """Upper bound on that rate, with 97.5 % confidence; audits must not show more."""


class RouterFile(_Part):
    """router.json. Without a certificate `threshold` is None and every request goes to the teacher."""

    model_config = ConfigDict(extra="allow")

    schema_: Literal[1] = Field(default=1, alias="schema")
    task: str
    binds: Binds
    threshold: float | None
    certified: bool
    keep: float
    confidence: float
    reason: str = ""
    predictors: list[PredictorPrompt]
    sampling: Sampling
    model: ConfidenceWeights | None
    neighbours: FileName | None = None
    audit: AuditBaseline | None = None
    """None without a certificate, and in releases from before there were audits."""

    @model_validator(mode="after")
    def _complete(self) -> RouterFile:
        if self.certified and (self.threshold is None or self.model is None):
            raise ValueError("certified is true without a threshold and a model; run certify again")
        return self

    def mismatches(self, **found: str) -> list[str]:
        """Faults where what runs is not what was certified: `router.mismatches(runtime="embedded")`."""
        bound = self.binds.model_dump()
        return [
            f'the certificate binds {name} "{bound[name]}", "{value}" is in use; '
            f"serve what was certified, or run certify with it"
            for name, value in found.items()
            if bound[name] != value
        ]


@dataclass(frozen=True)
class Release:
    """A release whose every file has the hash that the manifest gives."""

    folder: Path
    manifest: Manifest
    router: RouterFile

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def model(self) -> Path:
        return self.folder / self.manifest.model.file

    @property
    def neighbours(self) -> Path | None:
        return self.folder / self.router.neighbours if self.router.neighbours else None

    @property
    def program(self) -> Path:
        """State of the DSPy program, as JSON."""
        return self.folder / "program.json"

    @property
    def interface(self) -> Path | None:
        """The program's inputs and outputs as JSON schemas; None in releases from before there was one."""
        return self.folder / INTERFACE if INTERFACE in self.manifest.files else None

    @property
    def task(self) -> Path:
        return self.folder / "task.yaml"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def content_hash(files: Mapping[str, str]) -> str:
    """First 8 hex digits of the hash over all files (name to `sha256:…`) but those with measured times."""
    content = {name: digest for name, digest in files.items() if name not in NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]


def load(folder: Path) -> Release:
    """Read a release and check its schema, every file's hash, and what the router is bound to.

    Raises:
        ReleaseInvalid: something is missing, extra, altered, or does not belong together.
    """
    manifest = _read(folder / "manifest.json", Manifest)
    faults = _file_faults(folder, manifest.files)
    if faults:
        raise ReleaseInvalid(faults)
    release = Release(folder, manifest, _read(folder / "router.json", RouterFile))
    faults = _binding_faults(release)
    if faults:
        raise ReleaseInvalid(faults)
    return release


def versions(folder: Path) -> list[str]:
    """Versions in a task's releases folder, oldest first. Says nothing about their hashes."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if VERSION.fullmatch(entry.name) and (entry / "manifest.json").is_file()
    )


def current_version(folder: Path) -> str | None:
    """The version that `current` names; cheap enough to ask again and again.

    Raises:
        ReleaseInvalid: `current` holds something that is no version.
    """
    try:
        version = (folder / "current").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not VERSION.fullmatch(version):
        raise ReleaseInvalid([f'{folder / "current"} holds "{version[:60]}", no version; run rollback'])
    return version


def current(folder: Path) -> Release | None:
    """The release in use in a task's releases folder, checked; None before the first one.

    Raises:
        ReleaseInvalid: as `load`, or `current` names a release that is not there.
    """
    version = current_version(folder)
    return load(folder / version) if version else None


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, kind: type[PartT]) -> PartT:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ReleaseInvalid([f"{path} is missing; run release again, or roll back"]) from None
    except ValidationError as error:
        raise ReleaseInvalid([_schema_fault(path, dict(fault)) for fault in error.errors()]) from error


def _schema_fault(path: Path, fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if where == "schema":
        return f"{path} has schema {fault['input']}, this version reads {SCHEMA}; upgrade Homestill"
    return f"{path}: {where or 'the file'}: {fault['msg']}; run release again, or roll back"


def _file_faults(folder: Path, files: Mapping[str, str]) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    found = {path.relative_to(folder).as_posix() for path in paths}
    faults = [f"{folder / name} is missing; restore it, or roll back" for name in sorted(set(files) - found)]
    faults += [
        f"{folder / name} is not in the manifest; remove it, or roll back"
        for name in sorted(found - set(files) - UNLISTED)
    ]
    faults += [
        f"{folder / name} is not the file that was released (its SHA-256 differs); restore it, or roll back"
        for name in sorted(set(files) & found)
        if file_digest(folder / name) != files[name]
    ]
    return faults


def _binding_faults(release: Release) -> list[str]:
    manifest, router = release.manifest, release.router
    model = manifest.model
    pairs = [
        ("task of router.json", router.task, manifest.task),
        ("model that router.json binds", router.binds.model, model.sha256),
        ("quantization that router.json binds", router.binds.quantization, model.quantization),
        ("hash of the model file", manifest.files.get(model.file), f"sha256:{model.sha256}"),
        ("threshold of router.json", router.threshold, manifest.router.threshold),
        ("certified of router.json", router.certified, manifest.router.certified),
        ("content of the files", content_hash(manifest.files), manifest.version.rpartition("-")[2]),
        ("name of the folder", release.folder.name, manifest.version),
    ]
    faults = [
        f"{release.folder}: {what} is {found}, the manifest says {said}; run release again, or roll back"
        for what, found, said in pairs
        if found != said
    ]
    if router.neighbours and router.neighbours not in manifest.files:
        faults.append(f"{release.folder}: the manifest lacks {router.neighbours}; run release again")
    return faults
