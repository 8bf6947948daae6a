"""One training, measured, in a process of its own: `python contestant.py SPEC RESULT`.

SPEC and RESULT are JSON files. The measured time is that of the training loop alone: loading, tokenizing
and writing are outside of it. Tokens computed are counted where they enter the model, at its embedding.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from trainer.training import prefix
from trainer.training.batches import ByLength, collate, groups_of

MATMUL = 4096
"""Rows and columns of the matrices that the machine's speed is measured with."""


class Meter(TrainerCallback):  # type: ignore[misc]  # untyped in the library
    """Seconds, seconds of all cores' work, memory and computed tokens of the training loop."""

    def __init__(self, model: Any) -> None:
        self.result: dict[str, Any] = {"computed": 0}
        model.get_input_embeddings().register_forward_pre_hook(self._count)
        self._running = False

    def _count(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if self._running and not torch.is_inference_mode_enabled():
            self.result["computed"] += arguments[0].numel()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.result["before_mb"] = reset_peak()
        self._running = True
        self._began, self._worked = time.perf_counter(), time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.result["seconds"] = time.perf_counter() - self._began
        self.result["cpu_seconds"] = time.process_time() - self._worked
        self._running = False
        self.result["peak_mb"] = peak()


def reset_peak() -> float:
    """Forget the peak so far. Returns the MB in use."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    clear = Path("/proc/self/clear_refs")
    if clear.exists():  # Linux: 5 sets the peak of the resident set back
        clear.write_text("5")
    return peak()


def peak() -> float:
    """Peak MB since `reset_peak`: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def load(spec: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and its tokenizer; 4-bit where the method is qlora."""
    set_seed(spec["seed"])
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": torch.bfloat16 if cuda else torch.float32}
    if spec["method"] == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if spec["attention"]:
        options["attn_implementation"] = spec["attention"]
    model = AutoModelForCausalLM.from_pretrained(spec["base"], local_files_only=True, **options)
    return model.to("cuda") if cuda else model, AutoTokenizer.from_pretrained(spec["base"])


def lora(spec: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=spec["rank"],
        lora_alpha=2 * spec["rank"],
        lora_dropout=0.0,
        bias="none",
    )


def arguments(spec: dict[str, Any]) -> Any:
    """The recipe, the same for all but DSPy's."""
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=spec["work"],
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=spec["checkpointing"],
        max_length=None,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=spec["step"] // spec["batch"],
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=spec["steps"] // 10,
        loss_type=spec["loss"] if spec["loss"] != "shared" else "chunked_nll",
        optim="paged_adamw_32bit" if spec["method"] == "qlora" else "adamw_torch",
        logging_steps=10,
        save_strategy="no",
        seed=spec["seed"],
        data_seed=spec["seed"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )


def trl(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer with LoRA: as it is, or with our order, our loss or both."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import SFTTrainer

    from trainer.training.passes import StepTrainer

    model, tokenizer = load(spec)
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in read(spec["rows"])]
    wrapped: Any = get_peft_model(model, lora(spec))
    meter = Meter(model)
    common: dict[str, Any] = {
        "model": wrapped,
        "args": arguments(spec),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": [meter],
    }
    pad = int(tokenizer.pad_token_id or 0)
    if spec["order"] == "random":
        trainer = SFTTrainer(**common)
    else:
        lengths = [len(row["input_ids"]) for row in rows]
        groups = groups_of(rows, spec["step"])
        trainer = StepTrainer(
            at_once=spec["step"],
            order=ByLength(lengths, spec["step"], spec["seed"], groups),
            summed=model if spec["loss"] == "shared" else None,
            data_collator=lambda batch: collate(batch, pad),
            **common,
        )
    trainer.train()
    return meter.result | {"held_out": held_out(wrapped, model, spec, pad)}


def shim(spec: dict[str, Any]) -> dict[str, Any]:
    """Put back into this process's trl and transformers what DSPy's recipe needs and they no longer have.

    `trl.setup_chat_format` (refuses, as it always did for a tokenizer with a template), `warmup_ratio`,
    `max_seq_length` and two `dataset_kwargs` of SFTConfig, and `apply_chat_template` returning a tensor.

    Returns:
        Where the recipe's trainer will leave its model and meter.
    """
    import trl as library

    taken: dict[str, Any] = {}
    recipe = library.SFTConfig

    class Trainer(library.SFTTrainer):  # type: ignore[misc]  # untyped in the library
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            taken["model"] = self.model
            taken["meter"] = Meter(self.model)
            self.add_callback(taken["meter"])

    def config(*, warmup_ratio: float, max_seq_length: int, dataset_kwargs: Any, **options: Any) -> Any:
        quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
        cpu = {"use_cpu": not torch.cuda.is_available(), "seed": spec["seed"]}
        return recipe(max_length=max_seq_length, warmup_steps=warmup_ratio, **quiet, **cpu, **options)

    def setup_chat_format(**_: Any) -> None:
        raise ValueError("the tokenizer has a chat template already")

    tokenizer_class: Any = type(AutoTokenizer.from_pretrained(spec["base"]))
    tokenizer_class.apply_chat_template = partialmethod(
        tokenizer_class.apply_chat_template, return_dict=False
    )
    vars(library).update(SFTTrainer=Trainer, SFTConfig=config, setup_chat_format=setup_chat_format)
    return taken


def dspy_local(spec: dict[str, Any]) -> dict[str, Any]:
    """DSPy's own recipe, LocalProvider's function itself, over `shim`.

    Its values stay: LoRA of rank 32 on all linear layers, learning rate 1e-5, constant, clipped at 2, packed
    rows, one row a pass.
    """
    from dspy.clients import lm_local

    taken = shim(spec)
    lm_local.train_sft_locally(
        model_name=spec["base"],
        train_data=[{"messages": row["messages"]} for row in read(spec["rows"])],
        train_kwargs={
            "use_peft": True,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": spec["accumulation"],
            "learning_rate": 1e-5,
            "max_seq_length": spec["packed"],
            "packing": True,
            "bf16": torch.cuda.is_available(),
            "output_dir": spec["work"],
        },
    )
    model = taken["model"]
    result: dict[str, Any] = taken["meter"].result
    return result | {"held_out": held_out(model, model.get_base_model(), spec, 0)}


def held_out(wrapped: Any, model: Any, spec: dict[str, Any], pad: int) -> float:
    """Mean cross entropy of the held-out answers' tokens, computed alike for all."""
    rows = read(spec["held_out"])
    total, count = 0.0, 0
    wrapped.eval()
    with torch.inference_mode():
        for at in range(0, len(rows), 16):
            batch = {name: value.to(model.device) for name, value in collate(rows[at : at + 16], pad).items()}
            total += float(prefix.loss_sum(model, **batch))
            count += int((batch["labels"][:, 1:] != -100).sum())
    return total / max(count, 1)


def matmul_rate() -> float:
    """FLOP/s of the machine's large matrix products, in the precision that is trained in."""
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    one, other = (torch.randn(MATMUL // (1 if cuda else 2), MATMUL, **options) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        one @ other.T
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * one.shape[0] * other.shape[0] * MATMUL / best


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = dspy_local(spec) if spec["loss"] == "dspy" else trl(spec)
    result["matmul"] = matmul_rate()
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
