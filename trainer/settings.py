"""The settings of task.yaml: one frozen model per section, every field with its default and range."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]
MOST = 4096
"""Of what a number of rows, batches or processes may be."""


def _count(value: Any, info: ValidationInfo) -> Any:
    """One message for a union, whose branches would each have their own."""
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST):
        raise ValueError(
            f"student.train.{info.field_name} is {value!r}; use a whole number from 1 to {MOST}, or auto"
        )
    return value


def _modules(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if not named and value not in ("all-linear", "attention", "mlp"):
        raise ValueError(
            f"student.train.target_modules is {value!r}; use all-linear, attention, mlp, or a list of names"
        )
    return value


CountOrAuto = Annotated[Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"], BeforeValidator(_count)]
Modules = Annotated[Literal["all-linear", "attention", "mlp"] | list[str], BeforeValidator(_modules)]


class Section(BaseModel):
    """A section of task.yaml. Unknown keys are faults, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, given: Any) -> Any:
        """`curate:` with nothing below it, or with comments alone, is the section as it is by default."""
        if not isinstance(given, dict):
            return given
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        return {key: value for key, value in given.items() if value is not None or key not in sections}


class Price(Section):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    """Of what is sent."""
    output: float = Field(ge=0)
    """Of what is answered."""


class TeacherSettings(Section):
    """The API model that is distilled: any name that `dspy.LM` takes."""

    model: str = "openai/gpt-4o"
    """Provider and model."""
    api_base: str | None = None
    """Address of a gateway or stand-in; HOMESTILL_TEACHER_API_BASE goes before."""
    price_per_1m: Price | None = None
    """Needed where the model's price is not known."""
    stand_in: bool = False
    """Not a real API model: every report says so."""
    optimizer: Literal["none", "bootstrap", "random_search", "mipro", "gepa"] = "none"
    """DSPy's prompt optimizer that works on the program before its traces are captured."""
    budget_usd: float = Field(default=20.0, ge=0)
    """The call that could pass it is not made."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of its sampling; 0 asks for the likeliest answer."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer, in tokens; the worst case that the budget reckons with."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Calls at a time."""
    timeout_s: float = Field(default=120.0, gt=0)
    """For one call."""
    retries: int = Field(default=5, ge=0, le=20)
    """Of a call that failed for a passing reason, each after a longer wait."""


class ReplaySettings(Section):
    """General conversations that are mixed in, so that the student keeps what it could before."""

    data: str
    """A JSONL file: a line is {"messages": [{"role", "content"}, ...]}, the assistant's answer last."""
    share: float = Field(default=0.2, gt=0, le=0.5)
    """Their share of all rows that are trained on."""


class TrainSettings(Section):
    """The recipe. `batch_size` × `accumulation` examples make one optimizer step."""

    epochs: float = Field(default=3.0, gt=0, le=100)
    """How often every training row is seen."""
    batch_size: CountOrAuto = 4
    """Rows that pass through the model at once; `auto` counts as 4 and passes as many as the memory holds."""
    accumulation: int = Field(default=4, ge=1, le=MOST)
    """Batches whose gradients are added up before the weights change."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Its peak, after the warm-up; it then falls along a cosine. About 2e-5 for full, 0.02 for prompt."""
    rank: int = Field(default=16, ge=1, le=256)
    """Rank of the adapter's matrices (lora, qlora)."""
    alpha: int = Field(default=32, ge=1)
    """What the adapter adds is multiplied by alpha / rank, or alpha / √rank with rslora."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs that is left out at random while training."""
    rslora: bool = False
    """Scale by √rank instead of rank, which keeps high ranks stable (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Learn the length of every weight column apart from its direction (DoRA, arXiv 2402.09353); slower."""
    target_modules: Modules = "all-linear"
    """The linear layers that get an adapter: a group, or a list of names such as q_proj."""
    prompt_tokens: int = Field(default=20, ge=1, le=512)
    """Tokens of the soft prompt that method prompt learns."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of the trained weights (AdamW)."""
    clip: float = Field(default=1.0, gt=0)
    """Largest length of the gradient; a longer one is shortened."""
    max_length: int = Field(default=2048, ge=16)
    """Tokens; a longer example is left out and counted, never cut."""
    eval_share: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the train split that is held back for the evaluation loss."""
    eval_steps: int = Field(default=50, ge=1)
    """Optimizer steps between two evaluations, each followed by a checkpoint."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without a better loss before training stops."""
    replay: ReplaySettings | None = None
    """General data against forgetting."""
    processes: CountOrAuto = 1
    """Training processes on this machine, one a GPU; `auto` takes every GPU. The effective batch stays the same."""

    @property
    def step_rows(self) -> int:
        """The effective batch: rows of one optimizer step, whatever passes at once and on how many processes."""
        return (4 if self.batch_size == "auto" else self.batch_size) * self.accumulation


class StudentSettings(Section):
    """The open model that is fine-tuned, and how."""

    base: str = "unsloth/Llama-3.2-1B-Instruct"
    """A name on the model hub, or a folder beside task.yaml (docs/families.md says which architectures)."""
    method: Literal["lora", "qlora", "full", "prompt"] = "lora"
    """An adapter, one over a 4-bit base (CUDA), all weights, or a soft prompt alone."""
    quantize: Literal["f16", "q8_0", "q4_k_m"] = "q4_k_m"
    """Of the GGUF that is served: 16, 8.5 or about 4.8 bits a weight."""
    predictor: str | None = None
    """The one predictor of the program that is distilled; the teacher stays with the others. By default one model learns all."""
    deliver: Literal["merged", "adapter"] = "merged"
    """One whole model a task, or one base for several tasks and a small adapter for each (docs/adapters.md)."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest answer of the local model, in tokens."""
    context: int = Field(default=2048, ge=128)
    """Tokens of prompt and answer together that the local runtime holds."""
    train: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _adapter_exists(self) -> StudentSettings:
        if self.deliver == "adapter" and self.method not in ("lora", "qlora"):
            raise ValueError(
                f"student.deliver is adapter, and student.method {self.method} trains none; "
                "use lora or qlora, or set student.deliver to merged"
            )
        if self.deliver == "adapter" and self.train.dora:
            raise ValueError(
                "student.deliver is adapter, and student.train.dora is true, which a GGUF adapter has no place "
                "for; leave dora out, or set student.deliver to merged"
            )
        return self


class SplitSettings(Section):
    """Shares of the curated examples; used where `data` is not already split."""

    train: Fraction = 0.5
    """What the student learns from."""
    calibrate: Fraction = 0.25
    """What confidence and threshold are made from."""
    test: Fraction = 0.25
    """Sealed: what the release is measured on."""

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
    """A shorter completion is left out."""
    max_chars: int = Field(default=16_000, ge=1)
    """And so is a longer one."""
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
    """Share of the teacher's score that the hybrid keeps ..."""
    confidence: Fraction = 0.95
    """... with this probability."""


class RetrainSettings(Section):
    """When `homestill watch` runs the task again by itself."""

    min_new_traces: int = Field(default=500, ge=1)
    """Requests that the teacher has answered at the endpoint since the last run, from which they are trained on."""
    schedule: str | None = Field(
        default=None, pattern=r"^(daily ([01]\d|2[0-3]):[0-5]\d|every [1-9]\d{0,2} h)$"
    )
    """`daily 03:00` (UTC) or `every 6 h`: a change waits for that. Without one it is taken up at once."""


class Splits(Section):
    """Data that is already split."""

    train: str
    """Files of examples, as a path or a pattern beside task.yaml."""
    calibrate: str
    """The same."""
    test: str
    """The same."""


class TaskSettings(Section):
    """task.yaml, whole."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """What clients give as `model`."""
    program: str = Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")
    """File and class of the dspy.Module, such as program.py:Triage."""
    metric: str = Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")
    """File and function `metric(example, prediction, trace=None) -> bool or 0..1`."""
    keep_score: float = Field(default=1.0, ge=0, le=1)
    """A trace is trained on from this score on."""
    data: str | Splits
    """JSONL, CSV or Parquet: a path or pattern beside task.yaml, which curate splits, or one each for `train`,
    `calibrate` and `test`."""
    inputs: list[str] = Field(min_length=1)
    """The columns that the program is given."""
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    curate: CurateSettings = CurateSettings()
    quality: QualitySettings = QualitySettings()
    retrain: RetrainSettings = RetrainSettings()
    seed: int = Field(default=0, ge=0)
    """Of everything that is drawn: splits, order of training, baselines."""
