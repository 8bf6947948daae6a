"""A run of the words task on a small base, up to the stage that a test is about; the stages are the product's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tasks import row, write_task
from trainer import child, prepare, process, program, task
from trainer.data import example_id
from trainer.runs import Home, Run, write_json, write_jsonl
from trainer.runtimes import sixteen_bit
from trainer.runtimes.parity import Tokens
from trainer.template import GOLDEN
from trainer.traces import Answer, Store
from trainer.training import loop, merge

SYSTEM = "Your input fields are: `text` (str). Your output fields are: `label` (str)."
STUDENT = {
    "base": "./base",
    "quantize": "f16",
    "context": 512,
    "max_tokens": 12,
    "train": {"epochs": 4, "batch_size": 4, "accumulation": 1, "learning_rate": 0.01, "eval_steps": 100},
}
STRANGE = [{"messages": talk, "completion": '  {"a": "é \U0001f999 1234"}\n'} for talk in GOLDEN]
HELD_OUT = sorted(range(30, 36), key=lambda number: example_id(row(number), ["text"]))
"""In the order in which register asks for their answers."""


def messages(number: int) -> list[dict[str, str]]:
    text = f"[[ ## text ## ]]\n{row(number)['text']}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def answer(number: int) -> str:
    return f"[[ ## label ## ]]\n{row(number)['label']}\n\n[[ ## completed ## ]]"


def curated(root: Path, write_base: Callable[[Path], object]) -> Run:
    """A run of the words task on a base, as curate leaves it."""
    folder = write_task(root / "task", student=STUDENT)
    write_base(folder / "base")
    home, loaded = Home(root / "home"), task.load(folder)
    home.root.mkdir()
    environment = {"OMP_NUM_THREADS": "1"}
    run = Run(loaded, home, Store.open(home.database_url), home.runs("words") / "r", environment=environment)
    captured = {"program": "p", "teacher": "t", "system": "teacher"}
    write_json(run.stage("capture") / "summary.json", captured)
    write_json(run.stage("capture") / "program.json", program.load(loaded).state)
    write_jsonl(
        run.stage("curate") / "train.jsonl",
        [
            {"messages": messages(n), "completion": answer(n), "example": str(n), "predictor": "sort"}
            for n in range(24)
        ],
    )
    identities = {n: example_id(row(n), ["text"]) for n in HELD_OUT}
    write_jsonl(
        run.stage("curate") / "calibrate.jsonl",
        [{"id": identity, "values": row(n)} for n, identity in identities.items()],
    )
    for n, identity in identities.items():
        call = {"predictor": "sort", "messages": messages(n), "completion": answer(n)}
        run.store.add_answer(
            Answer("teacher", identity, "teacher", "words", {}, 1.0, 1.0, 1, 1, 0.0, None, [call])
        )
    return run


def train(run: Run) -> Path:
    """What the train stage has two processes do, whose imports would take most of these tests' time."""
    work = run.stage("train") / "work"
    work.mkdir()
    spec = prepare.prepare(run, {}).spec
    loop.train(spec, work)
    merge.merge(spec, work / "adapter", work.parent / "model")
    return work.parent / "model"


def answer_with_16_bits(run: Run, model: Path, tokens: Tokens) -> None:
    """The answers that register compares with, for the same reason in this process."""
    request = {
        "model": str(model),
        "prompts": [tokens.ids(messages(n)) for n in HELD_OUT],
        "max_tokens": STUDENT["max_tokens"],
        "ends": [tokens.tokenizer.convert_tokens_to_ids(text) for text in tokens.template.stop],
        "pad": 0,
        "batch": 8,
    }
    write_json(run.stage("register") / "sixteen_bit.json", sixteen_bit.answers(request))


def quantised(gguf: Path, kind: str) -> Path:
    folder, out = gguf.parent, gguf.with_name(f"{kind}.gguf")
    words = process.module("trainer.conversion.quantise", gguf, out, kind)
    log = folder / "log"
    assert child.run(words, folder=folder, log=log, environment=child.environment({})) == 0, log.read_text()
    return out
