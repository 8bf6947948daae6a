"""The process that trains: `python -m trainer.training.loop spec`, in the stage's work folder.

It takes up the last complete checkpoint, so a killed training goes on as if nothing had happened: the
order of the rows follows from seed and epoch alone, and the checkpoint holds optimizer, schedule,
random state and the patience of early stopping. Of several such processes the first one writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import child
from trainer.conversion import families
from trainer.runs import read_json, read_jsonl, write_json
from trainer.training import encoder_decoder, memory, methods, prefix
from trainer.training.batches import ByLength, collate, groups_of
from trainer.training.checkpoints import finished, keep_weights, last_checkpoint, trim_metrics

OUT_OF_MEMORY = 12
"""Exit code of a training for which not even one row fits into the memory."""


def train(
    spec: dict[str, Any], work: Path, before_pass: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Train to the end from wherever the work folder stands; the best weights go to `methods.KEPT`'s folder.

    Args:
        spec: of `train.prepare`.
        before_pass: of `StepTrainer`.

    Returns:
        What goes into train/summary.json; of several processes the first one knows.
    """
    cuda, first = torch.cuda.is_available(), rank() == 0
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model, tokenizer = methods.load_model(spec, cuda)
    about = describe(model, cuda)
    if first:
        child.emit("start", **about)
    checkpoints = work / "checkpoints"
    last = last_checkpoint(checkpoints)  # what a kill left half-written is gone: train.run looked before us
    done = int(last.name.rpartition("-")[2]) if last else 0
    before = trim_metrics(Path(spec["metrics"]), done) if first else 0.0
    if last is None or not finished(last, spec):
        trainer = build_trainer(spec, (model, tokenizer), work, cuda, before, before_pass=before_pass)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return about | result(spec, work) if first else {}


def describe(model: Any, cuda: bool) -> dict[str, Any]:
    """What is trained, and where."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        "trainable_parameters": trained,
        "parameters": model.num_parameters(),
        "device": "cuda" if cuda else "cpu",
        "device_name": torch.cuda.get_device_name() if cuda else "CPU",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def result(spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Put the best weights where the merge looks for them. Returns what goes into train/summary.json.

    No step is the best where no evaluation loss was finite; then there are no weights.
    """
    from trainer.training.passes import cut_before

    last = last_checkpoint(work / "checkpoints")
    assert last is not None  # the last step is always saved
    state = read_json(last / "trainer_state.json")
    if state["best_global_step"] is not None:
        best = last.with_name(f"checkpoint-{state['best_global_step']}")
        keep_weights(best, work / methods.KEPT[spec["method"]])
    metrics = read_jsonl(Path(spec["metrics"]))
    speeds = [row["tokens_per_s"] for row in metrics if "loss" in row]
    at_once, peak = cut_before(last)
    return {
        "steps": state["global_step"],
        "stopped_early": state["global_step"] < spec["steps"],
        "best_step": state["best_global_step"],
        "best_eval_loss": state["best_metric"],
        "seconds": metrics[-1]["seconds"],
        "tokens_per_s": round(sum(speeds) / len(speeds)),
        "rows_at_once": at_once,
        "peak_bytes": peak,
    }


def build_trainer(
    spec: dict[str, Any],
    loaded: tuple[Any, Any],
    work: Path,
    cuda: bool,
    seconds_before: float,
    *,
    before_pass: Callable[[int], None] = lambda _: None,
) -> Any:
    """TRL's trainer on our rows. trl is imported here, for unsloth must come before it."""
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback

    from trainer.training.passes import StepTrainer, cut_before
    from trainer.training.sft import Metrics

    model, tokenizer = loaded
    rows = read_jsonl(work / "train.jsonl")
    lengths = [len(row["input_ids"]) for row in rows]
    last = last_checkpoint(work / "checkpoints")
    at_once, peak = cut_before(last) if last else (spec["rows_at_once"], 0)
    plain: Any = model.get_base_model() if methods.KEPT[spec["method"]] == "adapter" else model
    encodes = plain.config.model_type in families.ENCODER_DECODERS
    shares = spec["backend"] == "trl" and prefix.supports(plain)  # unsloth replaces the layers' code
    if shares and cuda:
        prefix.checkpoint_layers(plain)
    metrics = Metrics(Path(spec["metrics"]), work / "checkpoints", seconds_before)
    trainer = StepTrainer(
        at_once=at_once,
        before_pass=before_pass,
        order=ByLength(lengths, spec["step_rows"], spec["seed"], groups_of(rows, spec["step_rows"])),
        summed=plain if shares or encodes else None,
        loss=encoder_decoder.loss_sum if encodes else prefix.loss_sum,
        model=model,
        args=arguments(spec, work / "checkpoints", cuda, checkpointing=cuda and not shares),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(read_jsonl(work / "eval.jsonl")),
        data_collator=lambda rows: (encoder_decoder.collate if encodes else collate)(rows, spec["pad"]),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(spec["settings"]["patience"]), *([metrics] if rank() == 0 else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.peak_bytes = peak
    metrics.trainer = trainer
    return trainer


def arguments(spec: dict[str, Any], checkpoints: Path, cuda: bool, *, checkpointing: bool) -> Any:
    """The recipe in TRL's words. A batch is a whole step: `StepTrainer` cuts it."""
    from trl import SFTConfig

    settings = spec["settings"]
    every = min(settings["eval_steps"], spec["steps"])
    paged = spec["backend"] == "unsloth" or spec["method"] == "qlora"
    return SFTConfig(
        output_dir=str(checkpoints),
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=checkpointing,
        max_length=settings["max_length"],
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=spec["step_rows"],
        per_device_eval_batch_size=spec["step_rows"],
        gradient_accumulation_steps=1,
        average_tokens_across_devices=False,
        max_steps=spec["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(settings["warmup_ratio"] * spec["steps"]),
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip"],
        optim="paged_adamw_32bit" if paged else "adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number is told as such, not as 0
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=False,  # the best checkpoint's weights are copied instead
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        seed=spec["seed"],
        data_seed=spec["seed"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )


def rank() -> int:
    """Number of this process among those that train together."""
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    spec = child.read_spec()
    work = Path.cwd()
    try:
        done = train(spec, work)
    except (RuntimeError, MemoryError) as error:
        if not memory.out_of_memory(error):
            raise
        sys.stderr.write(f"a single row does not fit into the memory: {error}\n")
        sys.exit(OUT_OF_MEMORY)
    if done:
        write_json(work / "result.json", done)
    _leave()


def _leave() -> None:
    """End together with the other processes: one that just exits may abort in gloo's threads, after all its work."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
