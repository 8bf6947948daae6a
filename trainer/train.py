"""Train: fine-tune the base on the curated conversations, then merge into 16-bit weights.

The rows are tokenized here, the training and the merge run in processes of their own. What is learned
is the answer with its end-of-turn token. Everything under `work/` survives a kill and is taken up again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import child, process
from trainer.errors import TrainError
from trainer.progress import Advance, progress
from trainer.runs import Run, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from trainer.settings import TrainSettings
from trainer.template import Template
from trainer.training import base as bases
from trainer.training.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("homestill.train")

UNSLOTH_PROBE = (
    "import torch; assert torch.cuda.is_available(); import unsloth; assert unsloth.DEVICE_TYPE == 'cuda'"
)
UNSLOTH_QUIET = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_AUTO_INSTALL": "0"}
PAD = "<|finetune_right_pad_id|>"


@dataclass(frozen=True)
class Rows:
    """The tokenized train split: {"input_ids", "labels"} a row."""

    train: list[dict[str, list[int]]]
    evaluate: list[dict[str, list[int]]]
    too_long: int

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.train)


def inputs(run: Run) -> dict[str, Any]:
    """What the weights depend on."""
    settings = run.task.settings
    return {
        "rows": sha256_file(run.folder / "curate" / "train.jsonl"),
        "base": bases.sha256(bases.resolve(run)),
        "method": settings.student.method,
        "train": settings.student.train.model_dump(),
        "seed": settings.seed,
        "versions": bases.versions("torch", "transformers", "trl", "peft"),
    }


def run(run: Run) -> None:
    """Write train/model, train/adapter (LoRA), train/metrics.jsonl and train/summary.json.

    Raises:
        TrainError: the base cannot be used, no row fits, or the training failed.
        DiskError: weights and checkpoints would not fit.
    """
    folder = run.stage("train")
    if (folder / "summary.json").exists():
        return  # written last: only the pipeline's record was lost
    work = folder / "work"
    work.mkdir(exist_ok=True)
    environment = child.environment(run.environment) | UNSLOTH_QUIET
    about, spec = prepare(run, environment)
    write_json(work / "spec.json", spec)
    if not (work / "result.json").exists():
        last = last_checkpoint(work / "checkpoints")
        done = int(last.name.rpartition("-")[2]) if last else 0
        with progress("training", spec["steps"], done) as advance:
            _run_child(
                "trainer.training.loop", work, environment, folder / "train.log", _Reporter(advance, done)
            )
    _run_child(
        "trainer.training.merge", work, environment, folder / "train.log", _Reporter(lambda *_: None, 0)
    )
    _adopt(work / "merged", folder / "model")
    if spec["method"] == "lora":
        shutil.copytree(
            work / "adapter", work / "copy", dirs_exist_ok=True
        )  # a rerun merges from the original
        _adopt(work / "copy", folder / "adapter")
    write_json(folder / "summary.json", about | read_json(work / "result.json"))
    shutil.rmtree(work)


def prepare(run: Run, environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokenize the rows into the work folder. Returns the summary so far, and what the child is told."""
    from transformers import AutoTokenizer

    folder, student, seed = run.stage("train"), run.task.settings.student, run.task.settings.seed
    base = bases.resolve(run)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    template = Template.freeze(tokenizer)
    conversations = read_jsonl(run.folder / "curate" / "train.jsonl")
    rows = tokenize(conversations, tokenizer, template, student.train, seed)
    run.need_disk(disk_needed(bases.weight_bytes(base), student.method), "training")
    write_jsonl(folder / "work" / "train.jsonl", list(rows.train))
    write_jsonl(folder / "work" / "eval.jsonl", list(rows.evaluate))
    about = {
        "backend": choose_backend(student.method, environment),
        "method": student.method,
        "base": student.base,
        "base_sha256": bases.sha256(base),
        "template_sha256": template.sha256,
        "rows": len(rows.train),
        "eval_rows": len(rows.evaluate),
        "dropped_too_long": rows.too_long,
        "tokens": rows.tokens,
    }
    spec = {
        "base": str(base),
        "method": student.method,
        "backend": about["backend"],
        "settings": student.train.model_dump(),
        "steps": steps(len(rows.train), student.train),
        "seed": seed,
        "pad": pad_id(tokenizer),
        "metrics": str(folder / "metrics.jsonl"),
        "template": template.to_json(),
    }
    log.warning(
        "training (%s, %s) of %s: %d rows, %d held back, %d left out as too long; %d tokens, %d steps",
        student.method,
        about["backend"],
        student.base,
        len(rows.train),
        len(rows.evaluate),
        rows.too_long,
        rows.tokens,
        spec["steps"],
    )
    return about, spec


def tokenize(
    conversations: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: TrainSettings,
    seed: int,
) -> Rows:
    """Tokenize the conversations and hold some examples back, all rows of an example on the same side.

    Raises:
        TrainError: fewer than two examples fit into `max_length`.
    """
    fitting: dict[str, list[dict[str, list[int]]]] = {}
    longest = 0
    too_long = 0
    for row in conversations:
        ids, labels = template.encode(tokenizer, row["messages"], row["completion"])
        longest = max(longest, len(ids))
        if len(ids) > settings.max_length:
            too_long += 1
        else:
            fitting.setdefault(row["example"], []).append({"input_ids": ids, "labels": labels})
    if len(fitting) < 2:
        raise TrainError(
            f"{len(fitting)} of {len(fitting) + too_long} training examples fit into student.train.max_length, "
            f"{settings.max_length} tokens; at least 2 are needed: raise it to {longest}"
        )
    order = sorted(fitting, key=lambda example: hashlib.sha256(f"{seed}:{example}".encode()).digest())
    held = max(1, round(len(order) * settings.eval_share))
    return Rows(
        train=[row for example in order[held:] for row in fitting[example]],
        evaluate=[row for example in order[:held] for row in fitting[example]],
        too_long=too_long,
    )


def steps(rows: int, settings: TrainSettings) -> int:
    """Optimizer steps of the whole training."""
    per_epoch = math.ceil(rows / (settings.batch_size * settings.accumulation))
    return max(1, math.ceil(settings.epochs * per_epoch))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows up: Llama 3's own, else the tokenizer's; masked, so any will do at last."""
    found = tokenizer.get_vocab().get(PAD, tokenizer.pad_token_id)
    return int(found if found is not None else tokenizer.eos_token_id)


def choose_backend(method: str, environment: dict[str, str]) -> str:
    """`unsloth` where its import succeeds on CUDA, in a process of its own for it patches its neighbours."""
    if method != "lora" or find_spec("unsloth") is None:
        return "trl"
    probe = process.run([sys.executable, "-c", UNSLOTH_PROBE], timeout=600, environment=environment)
    if probe.code:
        log.info("unsloth is installed but not used: %s", probe.last_line)
    return "trl" if probe.code else "unsloth"


def disk_needed(weights: int, method: str) -> int:
    """Bytes for the merged model (twice while it is made) and three checkpoints."""
    checkpoint = 6 * weights if method == "full" else weights // 10  # full: float32 weights and two moments
    return 2 * weights + 3 * checkpoint + 50_000_000


class _Reporter:
    """Shows a child's events."""

    def __init__(self, advance: Advance, step: int) -> None:
        self._advance = advance
        self._step = step
        self._evaluated = ""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            log.warning("%(trainable)d of %(parameters)d parameters are trained, on %(device)s", event)
        elif event["event"] == "evaluated":
            self._evaluated = f", evaluation loss {event['eval_loss']:.4f}"
        elif event["event"] == "progress":
            note = f"loss {event['loss']:.4f}{self._evaluated}, {event['tokens_per_s']} tokens/s"
            self._advance(event["step"] - self._step, note)
            self._step = event["step"]


def _run_child(
    module: str, work: Path, environment: dict[str, str], log_file: Path, report: _Reporter
) -> None:
    args = process.module(module, work / "spec.json")
    code = child.run(args, folder=work, log=log_file, environment=environment, report=report)
    if code:
        raise TrainError(
            f"{module} ended with code {code}: {child.last_line(log_file)}; the log is {log_file} "
            "(where memory was short, lower student.train.batch_size or max_length)"
        )


def _adopt(made: Path, place: Path) -> None:
    """Move a finished folder to its place, in one step where none stands there."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(made, place)
