"""The process that trains: `python -m trainer.training.loop spec`, in the stage's work folder.

It takes up the last complete checkpoint, so a killed training goes on as if nothing had happened: the
order of the rows follows from seed and epoch alone, and the checkpoint holds optimizer, schedule,
random state and the patience of early stopping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer import child
from trainer.runs import read_json, read_jsonl, write_json
from trainer.training import prefix
from trainer.training.batches import ByLength, collate, split_step
from trainer.training.checkpoints import finished, keep_weights, last_checkpoint, trim_metrics


def load_model(spec: dict[str, Any], cuda: bool) -> tuple[Any, Any]:
    """Model and tokenizer, with a LoRA adapter where the method is lora."""
    settings = spec["settings"]
    lora = {
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "bias": "none",
    }
    if spec["backend"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            spec["base"], max_seq_length=settings["max_length"], dtype=None, load_in_4bit=False
        )
        modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = FastLanguageModel.get_peft_model(
            model,
            **lora,
            target_modules=modules,
            use_gradient_checkpointing="unsloth",
            random_state=spec["seed"],
        )
        return model, tokenizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(spec["seed"])  # the adapter starts from random weights
    half = cuda and spec["method"] == "lora"
    model = AutoModelForCausalLM.from_pretrained(
        spec["base"],
        dtype=torch.bfloat16 if half else torch.float32,
        attn_implementation="sdpa" if cuda else "eager",
        local_files_only=True,
    )
    if spec["method"] == "lora":
        # every linear layer but the head, which is tied to the embeddings
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
        model = get_peft_model(model, config)
    return model, AutoTokenizer.from_pretrained(spec["base"], local_files_only=True)


def train(spec: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train to the end from wherever the work folder stands; the best weights go to adapter/ or weights/.

    Returns:
        What goes into train/summary.json.
    """
    cuda = torch.cuda.is_available()
    model, tokenizer = load_model(spec, cuda)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parameters = model.num_parameters()
    child.emit(
        "start",
        trainable=trainable,
        parameters=parameters,
        device=torch.cuda.get_device_name() if cuda else "CPU",
    )
    checkpoints = work / "checkpoints"
    last = last_checkpoint(checkpoints)
    done = int(last.name.rpartition("-")[2]) if last else 0
    before = trim_metrics(Path(spec["metrics"]), done)
    if last is None or not finished(last, spec):
        trainer = build_trainer(spec, (model, tokenizer), work, cuda, before)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        last = last_checkpoint(checkpoints)
    assert last is not None  # the last step is always saved
    state = read_json(last / "trainer_state.json")
    best = checkpoints / f"checkpoint-{state['best_global_step']}"
    keep_weights(best, work / ("adapter" if spec["method"] == "lora" else "weights"))
    metrics = read_jsonl(Path(spec["metrics"]))
    speeds = [row["tokens_per_s"] for row in metrics if "loss" in row]
    return {
        "steps": state["global_step"],
        "stopped_early": state["global_step"] < spec["steps"],
        "best_step": state["best_global_step"],
        "best_eval_loss": state["best_metric"],
        "seconds": metrics[-1]["seconds"],
        "tokens_per_s": round(sum(speeds) / len(speeds)),
        "trainable_parameters": trainable,
        "parameters": parameters,
        "device": "cuda" if cuda else "cpu",
    }


def build_trainer(
    spec: dict[str, Any], loaded: tuple[Any, Any], work: Path, cuda: bool, seconds_before: float
) -> Any:
    """TRL's trainer on our rows. trl is imported here, for unsloth must come before it."""
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback

    from trainer.training.sft import Metrics, SharedPrefixTrainer

    model, tokenizer = loaded
    settings = spec["settings"]
    rows = read_jsonl(work / "train.jsonl")
    lengths = [len(row["input_ids"]) for row in rows]
    step = settings["batch_size"] * settings["accumulation"]
    batch = settings["batch_size"]
    if not cuda:
        batch = split_step(step, batch, max(lengths), model.config)
    plain: Any = model.get_base_model() if spec["method"] == "lora" else model
    # checkpointing recomputes layers without their cache, and unsloth replaces the layers' code
    shares = not cuda and spec["backend"] == "trl" and prefix.supports(plain)
    metrics = Metrics(Path(spec["metrics"]), work / "checkpoints", seconds_before)
    trainer = SharedPrefixTrainer(
        order=ByLength(lengths, step, spec["seed"]),
        shared=plain if shares else None,
        model=model,
        args=arguments(spec, work / "checkpoints", batch, cuda),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(read_jsonl(work / "eval.jsonl")),
        data_collator=lambda rows: collate(rows, spec["pad"]),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(settings["patience"]), metrics],
    )
    trainer.remove_callback(PrinterCallback)
    metrics.trainer = trainer
    return trainer


def arguments(spec: dict[str, Any], checkpoints: Path, batch: int, cuda: bool) -> Any:
    """The recipe in TRL's words."""
    from trl import SFTConfig

    settings = spec["settings"]
    every = min(settings["eval_steps"], spec["steps"])
    return SFTConfig(
        output_dir=str(checkpoints),
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=cuda,
        max_length=settings["max_length"],
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=settings["batch_size"] * settings["accumulation"] // batch,
        max_steps=spec["steps"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(settings["warmup_ratio"] * spec["steps"]),
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip"],
        optim="paged_adamw_32bit" if spec["backend"] == "unsloth" else "adamw_torch",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
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


def main() -> None:
    spec = child.read_spec()
    work = Path.cwd()
    write_json(work / "result.json", train(spec, work))


if __name__ == "__main__":
    main()
