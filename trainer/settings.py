"""The settings of task.yaml: one frozen model per section, every field with its default and range."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A section of task.yaml. Unknown keys are faults, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(Section):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class TeacherSettings(Section):
    """The API model that is distilled: any name that `dspy.LM` takes."""

    model: str = "openai/gpt-4o"
    api_base: str | None = None
    price_per_1m: Price | None = None
    """Needed where the model's price is not known."""
    stand_in: bool = False
    """Not a real API model: every report says so."""
    optimizer: Literal["none", "bootstrap", "random_search", "mipro", "gepa"] = "none"
    budget_usd: float = Field(default=20.0, ge=0)
    """The call that could pass it is not made."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(default=8, ge=1, le=256)
    timeout_s: float = Field(default=120.0, gt=0)
    retries: int = Field(default=5, ge=0, le=20)


class TrainSettings(Section):
    """The recipe. `batch_size` × `accumulation` examples make one optimizer step."""

    epochs: float = Field(default=3.0, gt=0, le=100)
    batch_size: int = Field(default=4, ge=1)
    accumulation: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    rank: int = Field(default=16, ge=1, le=256)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=2048, ge=16)
    """Tokens; a longer example is left out and counted, never cut."""
    eval_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the train split that is held back for the evaluation loss."""
    eval_steps: int = Field(default=50, ge=1)
    patience: int = Field(default=3, ge=1)
    """Evaluations without a better loss before training stops."""


class StudentSettings(Section):
    """The open model that is fine-tuned, and how."""

    base: str = "unsloth/Llama-3.2-1B-Instruct"
    method: Literal["lora", "qlora", "full", "prompt"] = "lora"
    quantize: Literal["f16", "q8_0", "q4_k_m"] = "q4_k_m"
    max_tokens: int = Field(default=512, ge=1)
    """Longest answer of the local model, in tokens."""
    context: int = Field(default=2048, ge=128)
    """Tokens of prompt and answer together that the local runtime holds."""
    train: TrainSettings = TrainSettings()


class SplitSettings(Section):
    """Shares of the curated examples; used where `data` is not already split."""

    train: Fraction = 0.5
    calibrate: Fraction = 0.25
    test: Fraction = 0.25

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSettings:
        total = self.train + self.calibrate + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"curate.split adds up to {total:g}; make train, calibrate and test add up to 1")
        return self


class CurateSettings(Section):
    """What is kept of the captured examples."""

    min_examples: int = Field(default=50, ge=2)
    """Training examples below which the run stops."""
    min_chars: int = Field(default=1, ge=0)
    max_chars: int = Field(default=16_000, ge=1)
    """Bounds on the completion, in characters."""
    max_repetition: float = Field(default=0.5, gt=0, le=1)
    """Largest share of a completion's word 4-grams that may be repeats."""
    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of character 4-grams from which two inputs count as the same."""
    balance: str | None = None
    """An output field whose classes are evened out in the train split."""
    split: SplitSettings = SplitSettings()


class QualitySettings(Section):
    """The contract: keep this share of the teacher's score, with this confidence."""

    keep: Fraction = 0.98
    confidence: Fraction = 0.95


class Splits(Section):
    """Data that is already split."""

    train: str
    calibrate: str
    test: str


class TaskSettings(Section):
    """task.yaml, whole."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    program: str = Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")
    metric: str = Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")
    keep_score: float = Field(default=1.0, ge=0, le=1)
    data: str | Splits
    inputs: list[str] = Field(min_length=1)
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    curate: CurateSettings = CurateSettings()
    quality: QualitySettings = QualitySettings()
    seed: int = Field(default=0, ge=0)
