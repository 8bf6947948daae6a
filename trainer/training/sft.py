"""TRL's SFTTrainer with our rows, our order and the shared prefix; and what is written while it runs.

Import this after unsloth where unsloth is used: it patches trl.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from trainer import child
from trainer.runs import write_text
from trainer.template import IGNORED
from trainer.training import prefix
from trainer.training.checkpoints import COMPLETE


class SharedPrefixTrainer(SFTTrainer):  # type: ignore[misc]  # untyped in the library
    """Counts tokens, and computes what a batch's prompts have in common once.

    Args:
        order: the rows of each epoch; must follow from the seed, so that a resumed training sees the same.
        summed: the model inside any PEFT wrapper, whose forward is to give the summed loss; None: every row
            is computed whole, by transformers.
        loss: how it is summed; with the shared prefix by default.
    """

    def __init__(
        self,
        *,
        order: Sampler[int],
        summed: PreTrainedModel | None,
        loss: prefix.Loss = prefix.loss_sum,
        **options: Any,
    ) -> None:
        self._order = order
        self._sums = summed is not None
        self.tokens = 0
        super().__init__(**options)
        if summed is not None:
            prefix.install(summed, loss)  # after trl, which puts a forward of its own there

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint here is temporary and needs no card."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            self.tokens += int(inputs["attention_mask"].sum())
        if not self._sums:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        summed = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        if num_items_in_batch is None:
            loss = summed / (inputs["labels"][:, 1:] != IGNORED).sum()
        else:  # labels of the whole step, in all processes, whose gradients will be averaged
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = summed * processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss


class Metrics(TrainerCallback):  # type: ignore[misc]  # untyped in the library
    """Writes metrics.jsonl, reports to the parent process and marks complete checkpoints."""

    def __init__(self, path: Path, checkpoints: Path, seconds_before: float) -> None:
        self.trainer: Any = None
        self._path = path
        self._checkpoints = checkpoints
        self._seconds_before = seconds_before

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._last = time.monotonic()
        self._first = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        now = time.monotonic()
        row = {"step": state.global_step, "epoch": round(state.epoch, 4)}
        if "loss" in logs:
            row |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm")}
            row["tokens_per_s"] = round(self.trainer.tokens / max(now - self._last, 1e-9))
            self.trainer.tokens = 0
            left = (
                (state.max_steps - state.global_step)
                * (now - self._began)
                / (state.global_step - self._first)
            )
            child.emit("progress", **row, steps=state.max_steps, eta_s=round(left))
        elif "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
            child.emit("evaluated", **row)
        else:
            return
        self._last = now
        row["seconds"] = round(self._seconds_before + now - self._began, 2)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_text(self._checkpoints / f"checkpoint-{state.global_step}" / COMPLETE, "")
