"""What a release says of itself: manifest.json and router.json, field by field."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SCHEMA = 1
VERSION = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


def _plain_path(name: str) -> str:
    parts = name.split("/")
    if not name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f'"{name}" leaves the release; name a file below it')
    return name


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_plain_path)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class BaseInfo(Part):
    """The open model that the student was made from; sha256 of its weights."""

    name: str
    sha256: Digest


class DataInfo(Part):
    """Rows of each split, and one hash over all of them."""

    train: int
    calibrate: int
    test: int
    sha256: Digest


class TeacherInfo(Part):
    model: str
    stand_in: bool
    """Not a real API model: reports say so in their first line."""


class ModelInfo(Part):
    file: FileName
    sha256: Digest
    quantization: str
    ollama: str | None = None
    """The name that it is registered under, where Ollama runs it."""
    base: FileName | None = None
    """What `file` is a LoRA adapter of; None where it is a whole model."""


class Parity(Part):
    """How the served model compares with the trained weights; None where it was not measured."""

    prompt_tokens_equal: bool
    answers_equal: Share | None = None
    metric_delta: float | None = None
    """Served score minus the score of the 16-bit weights."""


class Score(Part):
    """Mean score (0..1) over `n` rows with its 95 % interval; failures count as 0."""

    mean: float
    low: float
    high: float
    n: int
    failures: int = 0


class RouterInfo(Part):
    """What router.json decides, for readers of the manifest."""

    threshold: float | None
    certified: bool
    keep: float
    confidence: float
    local_share: Share


class Latency(Part):
    """Milliseconds for one example."""

    mean: float | None = None
    p50: float
    p95: float


class Manifest(Part):
    """manifest.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    task: str
    version: Annotated[str, Field(pattern=rf"^{VERSION.pattern}$")]
    base: BaseInfo
    method: str
    predictor: str | None = None
    """The one predictor of the program that the model learned; the teacher stays with the others. None: it learned all."""
    data: DataInfo
    teacher: TeacherInfo
    model: ModelInfo
    parity: Parity
    scores: dict[str, Score]
    """By system: teacher, base, student and, where it was measured, hybrid."""
    router: RouterInfo
    latency_ms: dict[str, Latency]
    cost_per_1k_usd: dict[str, float]
    """By system, US dollars of API cost for 1,000 requests; the local machine's own cost is not in it."""
    software: dict[str, str]
    seed: int
    files: dict[FileName, Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]]

    def text(self) -> str:
        """The manifest as it is written."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, ensure_ascii=False) + "\n"


class Binds(Part):
    """What a certificate was measured on; it holds for nothing else."""

    model: Digest
    quantization: str
    template: str
    program: str
    adapter: str
    """DSPy's, which writes the prompts."""
    runtime: str
    base: Digest | None = None
    """Of the GGUF that the model is a LoRA adapter of."""


class OutputField(Part):
    """An output field of a predictor; `labels` where its values are an enum."""

    name: str
    labels: list[str] | None = None


class PredictorPrompt(Part):
    """The fixed part of one predictor's prompt, by which a request is recognised."""

    name: str
    fingerprint: str
    """SHA-256 of the messages before the last."""
    prefix: str
    suffix: str
    """Fixed start and end of the last message."""
    fields: list[OutputField]


class Sampling(Part):
    temperature: float
    max_tokens: int
    context: int


class ConfidenceWeights(Part):
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


class AuditBaseline(Part):
    """How often local answers that the threshold keeps differ from the teacher's, counted on the test rows."""

    fields: list[str]
    """The output fields that are compared."""
    kept: Annotated[int, Field(ge=0)]
    disagreed: Annotated[int, Field(ge=0)]
    upper: Annotated[float, Field(gt=0, le=1)]
    """Upper bound on that rate, with 97.5 % confidence; audits must not show more."""


class RouterFile(Part):
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
