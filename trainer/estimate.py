"""What a training will take: trained parameters, memory, time and disk, before anything is loaded.

Counted from the base's configuration and the headers of its weight files. What a layer keeps for the
backward pass follows Korthikanti et al. 2022 (arXiv 2205.05198), for gated feed-forward layers; how much
arithmetic a token takes follows Kaplan et al. 2020 (arXiv 2001.08361). The speed of the machine is
measured with one matrix product. train/summary.json keeps the estimate beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.machine import Machine
from trainer.runs import Run, read_jsonl
from trainer.settings import StudentSettings
from trainer.splits import assigned
from trainer.template import IGNORED
from trainer.training import base as bases
from trainer.training.shape import Shape, targeted

EXPORTING = 4
"""Times the 16-bit weights that export takes: both models in 16 bits while they are made, then quantised."""
PROCESS = {"cpu": 600_000_000, "cuda": 600_000_000}
"""Bytes of a training process that holds no model: Python's libraries, or CUDA's context."""
CPU_ACTIVATIONS = 2_000_000_000
"""Bytes that the activations of one pass may take on a CPU."""
EFFICIENCY = {"cpu": 0.35, "cuda": 0.4}
"""Share of a large matrix product's speed that a training reaches."""
FOUR_BITS = 0.52
"""Bytes a weight of nf4 with doubly quantised scales (arXiv 2305.14314)."""
CHARACTERS = 3.5
"""Of a token, where the text has not been tokenized yet."""


@dataclass(frozen=True)
class Work:
    """What is trained on."""

    rows: int
    tokens: int
    """Of all rows together, once."""
    longest: int
    learned: int
    """Most learned tokens of a row."""
    shared: int = 0
    """First tokens that all rows have in common; a CPU computes them once a pass."""
    known: str = ""
    """Why the numbers are upper bounds; empty where they were counted."""


@dataclass(frozen=True)
class Estimate:
    """Bytes, seconds, and whether it fits."""

    base: str
    method: str
    parameters: int
    trainable: int
    machine: Machine
    work: Work
    rows_at_once: int
    memory: dict[str, int]
    """Bytes by what they are for."""
    seconds: float
    disk: int
    disk_free: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.machine.free

    def lines(self) -> list[str]:
        """The estimate for a person: what is trained, then memory, time and disk, each with its remedy."""
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.memory.items())
        enough = f"{_gb(self.machine.free)} free on {self.machine.name}"
        return [
            f"{self.method} of {self.base}: {_count(self.trainable)} of {_count(self.parameters)} parameters "
            "are trained",
            f"memory: about {_gb(self.memory_bytes)} ({parts}), {enough}: "
            + ("it fits" if self.fits else f"IT DOES NOT FIT; {self._remedy()}"),
            f"time: about {_duration(self.seconds)} for {self.work.rows} rows, {_count(self.work.tokens)} tokens"
            + (f" ({self.work.known})" if self.work.known else ""),
            f"disk: {_gb(self.disk)} while training and exporting, {_gb(self.disk_free)} are free"
            + ("" if self.disk <= self.disk_free else "; free some space, or set HOMESTILL_HOME"),
        ]

    def _remedy(self) -> str:
        fixed = self.memory_bytes - self.memory["activations"]
        if fixed < self.machine.free:
            return "lower student.train.batch_size or max_length"
        if self.method == "full":
            return "use student.method lora, or a smaller base"
        if self.method == "lora" and self.machine.cuda:
            return "use student.method qlora, or a smaller base"
        return "use a smaller base, or a machine with more memory"

    def to_json(self) -> dict[str, Any]:
        """For train/summary.json."""
        return {
            "memory_bytes": self.memory_bytes,
            "memory": self.memory,
            "fits": self.fits,
            "seconds": round(self.seconds, 1),
            "rows_at_once": self.rows_at_once,
            "trainable_parameters": self.trainable,
            "disk_bytes": self.disk,
            "machine": asdict(self.machine),
        }

    def compared(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """The estimate with what was measured, for train/summary.json.

        Args:
            measured: train/summary.json, of which `peak_bytes` and `seconds` are read where they are there.
        """
        peak, seconds = measured.get("peak_bytes"), measured.get("seconds")
        return self.to_json() | {
            "measured_peak_bytes": peak,
            "memory_ratio": round(self.memory_bytes / peak, 3) if peak else None,
            "time_ratio": round(self.seconds / seconds, 3) if seconds else None,
        }


def of(run: Run, machine: Machine | None = None) -> Estimate:
    """The estimate for a run's training, from the best that is known of its rows by now.

    Args:
        machine: where it trains; by default the one that this process is on.

    Raises:
        TrainError: the base cannot be found or read.
        DiskError: the base has to be downloaded and does not fit.
    """
    student, folder = run.task.settings.student, bases.resolve(run)
    return estimate(
        Shape.read(folder),
        student,
        work_of(run),
        machine or Machine.here(run.environment),
        disk_free=run.disk_free(run.folder),
    )


def estimate(
    shape: Shape, student: StudentSettings, work: Work, machine: Machine, *, disk_free: int = 0
) -> Estimate:
    """What training `student` on `work` takes on `machine`."""
    trained = trainable(shape, student)
    each = activations(shape, student, work, cuda=machine.cuda)
    fixed = _fixed(shape, student.method, trained, machine)
    at_once = _at_once(student, each, machine.free - sum(fixed.values()), cuda=machine.cuda)
    shared = 0 if machine.cuda else work.shared
    passing = int(each * (at_once - (at_once - 1) * shared / max(work.longest, 1)))
    loading = max(0, shape.weight_bytes - passing) if not machine.cuda else 0
    memory = fixed | {"activations": passing} | ({"reading the base": loading} if loading else {})
    return Estimate(
        base=student.base,
        method=student.method,
        parameters=shape.parameters,
        trainable=trained,
        machine=machine,
        work=work,
        rows_at_once=at_once,
        memory=memory,
        seconds=_seconds(shape, student, work, machine, at_once),
        disk=disk_needed(shape.weight_bytes, student.method),
        disk_free=disk_free,
    )


def trainable(shape: Shape, student: StudentSettings) -> int:
    """Parameters that the method trains: all, a soft prompt's, or r·(in + out) of every adapted layer."""
    recipe = student.train
    if student.method == "full":
        return shape.parameters
    if student.method == "prompt":
        return recipe.prompt_tokens * shape.hidden
    adapted = [size for path, size in shape.matrices.items() if targeted(path, recipe.target_modules)]
    return sum(recipe.rank * (rows + columns) + recipe.dora * rows for rows, columns in adapted)


def activations(shape: Shape, student: StudentSettings, work: Work, *, cuda: bool) -> int:
    """Bytes that one row of the longest length keeps between forward and backward.

    A layer keeps per token: the inputs and results of both norms and residuals (8 hidden), queries twice
    and attention's result (3 hidden), keys and values plain, rotated and repeated for every head (2 hidden,
    3 keys), gate, up, activation and product (4 intermediate); an adapter's dropout keeps its input and
    mask for every layer. On a CPU in 32 bits, with the attention weights where they are not fused away; on
    CUDA in 16 bits, where layers are computed again and only their inputs and one layer's values are held. The head makes logits of
    learned tokens, and their gradients and logarithms beside them.
    """
    h, wide, kv = shape.hidden, shape.intermediate, shape.kv_width
    layer = 13 * h + 3 * kv + 4 * wide
    if student.method in ("lora", "qlora"):
        layer += round((1.25 if student.train.dropout else 0) * (6 * h + wide))
    head = 3 * 4 * work.learned * shape.vocabulary
    if cuda:
        return int(2 * work.longest * (shape.layers * h + 2 * layer) + head)
    attention = 0 if shape.fused else 3 * shape.heads * work.longest
    return int(4 * shape.layers * work.longest * (layer + attention) + head)


def disk_needed(weights: int, method: str) -> int:
    """Bytes that training and exporting write at most, for weights of so many bytes in 16 bits."""
    checkpoint = 6 * weights if method == "full" else weights // 10  # full: float32 weights and two moments
    training = 2 * weights + 3 * checkpoint
    return max(training, weights + EXPORTING * weights) + 100_000_000


def work_of(run: Run) -> Work:
    """The rows as they are known by now: tokenized by the train stage, curated, or only counted."""
    recipe = run.task.settings.student.train
    tokenized = run.folder / "train" / "work" / "train.jsonl"
    curated = run.folder / "curate" / "train.jsonl"
    if tokenized.is_file():
        return _counted(read_jsonl(tokenized))
    if curated.is_file():
        said = [(_text(row["messages"]), str(row["completion"])) for row in read_jsonl(curated)]
        lengths = [min(recipe.max_length, _tokens(prompt + answer)) for prompt, answer in said]
        return Work(
            rows=len(said),
            tokens=sum(lengths),
            longest=max(lengths, default=0),
            learned=max((_tokens(answer) for _, answer in said), default=0),
            known="their length judged by their characters",
        )
    rows = len(assigned(run.task).splits["train"])
    return Work(
        rows,
        rows * recipe.max_length,
        recipe.max_length,
        min(recipe.max_length, run.task.settings.student.max_tokens),
        known=f"nothing is captured yet: every row counted as student.train.max_length, {recipe.max_length}",
    )


def _counted(rows: list[dict[str, list[int]]]) -> Work:
    prompts = [row["input_ids"] for row in rows]
    first, last = min(prompts), max(prompts)  # all others begin with what these two share
    differ = next(
        (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first)
    )
    return Work(
        rows=len(rows),
        tokens=sum(map(len, prompts)),
        longest=max(map(len, prompts)),
        learned=max(sum(label != IGNORED for label in row["labels"]) for row in rows),
        shared=differ,
    )


def _fixed(shape: Shape, method: str, trained: int, machine: Machine) -> dict[str, int]:
    """Bytes that are held whatever the batch: the process, the weights, gradients and AdamW's two moments."""
    held = {"cpu": 4.0, "cuda": 2.0}[machine.kind]
    weights = held * shape.parameters
    if machine.cuda and method == "qlora":
        weights = FOUR_BITS * shape.linear + 2.0 * (shape.parameters - shape.linear)
    if machine.cuda and method == "full":
        weights = 6.0 * shape.parameters  # in 32 bits, and autocast's 16-bit copies
    if method != "full":
        weights += 4.0 * trained
    return {
        "libraries": PROCESS[machine.kind],
        "weights": int(weights),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }


def _at_once(student: StudentSettings, each: int, free: int, *, cuda: bool) -> int:
    """Rows that pass through the model together: what was asked for, or with `auto` what fits.

    A CPU takes more than were asked for where they fit: larger passes share the common prefix among more rows.
    """
    asked, step = student.train.batch_size, student.train.step_rows
    if asked != "auto" and cuda:
        return asked
    room = CPU_ACTIVATIONS if asked != "auto" else int(0.6 * max(0, free))
    most = min(step, room // max(each, 1))
    fitting = [size for size in range(1, most + 1) if step % size == 0]
    return max([1 if asked == "auto" else asked, *fitting])


def _seconds(shape: Shape, student: StudentSettings, work: Work, machine: Machine, at_once: int) -> float:
    """Arithmetic over speed. Forward 2 operations a weight and token, backward as much for the values
    and, where all weights are trained, again for the weights; on CUDA the forward pass is made twice."""
    passes = 2 + (student.method == "full") + machine.cuda
    spared = 0 if machine.cuda else work.shared * work.rows * (1 - 1 / at_once)
    tokens = max(0.0, work.tokens - spared)
    attention = 4 * shape.layers * shape.hidden * work.tokens / max(work.rows, 1)
    head = 2 * shape.vocabulary * shape.hidden * min(work.rows * work.learned, work.tokens)
    once = tokens * (2 * shape.linear + attention) + head
    return student.train.epochs * passes * once / (EFFICIENCY[machine.kind] * machine.flops)


def _text(messages: list[dict[str, str]]) -> str:
    return "".join(message["content"] for message in messages)


def _tokens(text: str) -> int:
    return round(len(text) / CHARACTERS)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _count(number: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
