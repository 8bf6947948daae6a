"""One optimizer step in as many passes as the memory asks for, on as many processes as there are.

transformers sees every optimizer step as one batch. Here it is cut: between the processes, and within
a process into passes of a few rows. The loss is summed over the step's learned tokens and divided once,
so how the rows are cut changes the rounding and nothing else. Where memory runs out, the step begins
again in passes of half the rows, with the random state that it began with: no step is lost or made twice.

Import this after unsloth where unsloth is used: it patches trl.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from trainer.runs import read_json, write_json
from trainer.template import IGNORED
from trainer.training import prompt
from trainer.training.memory import out_of_memory, peak_bytes
from trainer.training.sft import SharedPrefixTrainer

FILE = "passes.json"
"""In a checkpoint: how the step was cut, and the peak of memory so far."""

log = logging.getLogger("homestill.train")
Batch = dict[str, Tensor]


class StepTrainer(SharedPrefixTrainer):
    """Cuts a step into passes, and evaluates by the token.

    Args:
        at_once: rows that pass through the model at once, to begin with.
        before_pass: called with the number of rows of every training pass; a test runs out of memory here.
    """

    def __init__(
        self, *, at_once: int, before_pass: Callable[[int], None] = lambda _: None, **options: Any
    ) -> None:
        self.at_once = at_once
        self.peak_bytes = 0
        self._before_pass = before_pass
        super().__init__(**options)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a whole step; the gradients end up summed over passes and processes."""
        counted = self.tokens
        total = learned(inputs)
        mine = self._mine(inputs)
        began = _random_state()

        def learn(part: Batch) -> Tensor:
            self._before_pass(len(part["labels"]))
            loss: Tensor = super(StepTrainer, self).training_step(self.model, part, total)
            return loss

        while (loss := self._attempt(mine, learn)) is None:
            self.model.zero_grad(set_to_none=True)
            _restore(began)
        self.tokens = counted + int(inputs["attention_mask"].sum())  # of all processes, each row once
        self._add_up_gradients()
        whole: Tensor = loss * self.accelerator.num_processes  # what is logged is the mean over processes
        return whole

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._sums and self.args.world_size > 1:
            # trl gathers figures of its own in every pass, which the processes need not make equally many of
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **__: Any) -> Any:
        """The mean loss of a learned token over all held-back rows, however they are batched."""
        self.model.eval()
        summed, total, rows = torch.zeros((), device=self.args.device), 0, 0
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            mine = self._mine(inputs)
            while (loss := self._attempt(mine, self._summed_loss)) is None:
                pass
            summed, total, rows = (
                summed + loss,
                total + int(learned(inputs)),
                rows + len(inputs["labels"]),
            )
        if dist.is_initialized():
            dist.all_reduce(summed)
        metrics = {"eval_loss": float(summed) / total}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _summed_loss(self, part: Batch) -> Tensor:
        one = torch.ones((), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(self.model, part, num_items_in_batch=one)
        return loss

    def _attempt(self, inputs: Batch, one_pass: Callable[[Batch], Tensor]) -> Tensor | None:
        """What the passes give, added up; None where memory ran out: fewer rows go at once from now on."""
        summed = torch.zeros((), device=self.args.device)
        try:
            for part in cut(inputs, self.at_once):
                summed += one_pass(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or self.at_once == 1:
                raise
        else:
            return summed
        gc.collect()  # only here is the failed pass let go, which the error's frames held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before, self.at_once = self.at_once, max(1, min(self.at_once, len(inputs["labels"])) // 2)
        log.warning("out of memory with %d rows at once: the step begins again with %d", before, self.at_once)
        return None

    def _mine(self, inputs: Batch) -> Batch:
        """The rows of this process, neighbours together."""
        world, rank, rows = self.args.world_size, self.args.process_index, len(inputs["labels"])
        own = slice(rank * rows // world, (rank + 1) * rows // world)
        return {key: value[own] for key, value in inputs.items()}

    def _add_up_gradients(self) -> None:
        """Sum the gradients of all processes, once, when nothing more can fail on its own."""
        if not dist.is_initialized():
            return
        for weight in self.model.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        """Every process reads whole steps, in the same order; accelerate would deal the batches out."""
        loader = super()._get_dataloader(*args, **options)
        shard = loader.batch_sampler
        if hasattr(shard, "num_processes"):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if isinstance(self.model.get_input_embeddings(), prompt.SoftEmbedding):
            prompt.save(self.model, Path(output_dir or self.args.output_dir))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / prompt.FILE).exists():
            prompt.learned(self.model).data.copy_(prompt.load(folder))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.args.world_size == 1 or self.args.device.type != "cpu":
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # of several processes on a CPU, transformers asks for the device "cpu:0", which torch loads nothing to
        for name, held in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            held.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_bytes(torch.cuda.is_available()))
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            cut_now = {"at_once": self.at_once, "peak_bytes": self.peak_bytes}
            write_json(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / FILE, cut_now)
        self.accelerator.wait_for_everyone()  # only then is the checkpoint marked complete


def learned(inputs: Batch) -> Tensor:
    """How many tokens of a batch are learned; the first of a row never is."""
    return (inputs["labels"][:, 1:] != IGNORED).sum()


def cut(inputs: Batch, rows: int) -> Iterator[Batch]:
    """A batch in pieces of so many rows."""
    for start in range(0, len(inputs["labels"]), rows):
        yield {key: value[start : start + rows] for key, value in inputs.items()}


def cut_before(checkpoint: Path) -> tuple[int, int]:
    """Rows at once and peak of memory as a checkpoint has them."""
    kept = read_json(checkpoint / FILE)
    return int(kept["at_once"]), int(kept["peak_bytes"])


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the CPU and of this process's GPU; asking for another GPU's would take memory on it."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _restore(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
