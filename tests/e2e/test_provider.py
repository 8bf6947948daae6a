"""DSPy's own optimizers on the demo's base, taught by the stand-in teacher, on both runtimes.

All of them learn the same rows, so one training serves every test here: that it does is tested too. What
they score is in the records of `--junitxml`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dspy
import httpx
import pytest
from dspy.clients.lm_local import LocalProvider

from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Llama
from tests.servers import serving
from tests.trainer.training.support import running, wait_until
from trainer.provider import OllamaProvider, at_least
from trainer.provider.models import EmbeddedModels
from trainer.runs import read_json, read_jsonl
from trainer.training.checkpoints import COMPLETE

ROOT = Path(__file__).parents[2]
TICKETS = ROOT / "examples" / "tickets"
STUDENT = {
    "quantize": "q8_0",
    "context": 1024,
    "max_tokens": 48,
    "epochs": 3,
    "batch_size": 8,
    "accumulation": 1,
    "learning_rate": 0.002,
    "rank": 32,
    "alpha": 64,
    "dropout": 0.0,
    "max_length": 640,
}
TRAIN, HELD_OUT = slice(0, 192), slice(500, 532)
Record = Callable[[str, object], None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Sort(dspy.Signature):  # type: ignore[misc]
    """Sort a support ticket."""

    text: str = dspy.InputField()
    category: Literal["billing", "login", "delivery", "outage", "feature", "returns"] = dspy.OutputField()


class Judge(dspy.Signature):  # type: ignore[misc]
    """Say how urgent a support ticket is."""

    text: str = dspy.InputField()
    priority: Literal["low", "normal", "urgent"] = dspy.OutputField()


class Both(dspy.Module):  # type: ignore[misc]
    """Two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.sort, self.judge = dspy.Predict(Sort), dspy.Predict(Judge)

    def forward(self, text: str) -> Any:
        return dspy.Prediction(
            category=self.sort(text=text).category, priority=self.judge(text=text).priority
        )


def right(example: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(prediction.category == example.category)


def program(lm: dspy.LM) -> Any:
    made = dspy.Predict(Sort)
    made.set_lm(lm)
    return made


def examples(part: slice) -> list[Any]:
    lines = (TICKETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[part]
    return [dspy.Example(**json.loads(line)).with_inputs("text") for line in lines]


@dataclass
class Box:
    """A provider on one of the runtimes, and a stand-in teacher."""

    provider: OllamaProvider
    runtime: str
    teacher: dspy.LM
    home: Path
    double: OllamaDouble | None

    def run(self, candidate: Any) -> Path:
        """Where the model of a program was trained."""
        return Path(self.provider.weights(candidate.lm.model)).parents[1]

    def trainings(self) -> dict[str, Any]:
        """Every run that trained, with what its record says, the seconds among it."""
        records = (self.home / "runs" / "sorter").glob("*/train/stage.json")
        return {record.parents[1].name: read_json(record) for record in records}

    def learned(self, candidate: Any) -> list[dict[str, Any]]:
        """The rows that the model of a program learned, as DSPy gave them but in another order."""
        lines = (self.run(candidate) / "curate" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in reversed(lines)]
        return [
            {"messages": [*row["messages"], {"role": "assistant", "content": row["completion"]}]}
            for row in rows
        ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def teacher() -> Iterator[dspy.LM]:
    """A stand-in: it knows the answers from a file."""
    sys.path.insert(0, str(ROOT / "examples"))
    import standin_teacher as standin  # type: ignore[import-not-found, unused-ignore]

    sys.path.remove(str(ROOT / "examples"))
    known = standin.Answers.read([TICKETS / "data" / "train.jsonl"], ["text"])
    app = standin.create_app(standin.Teacher(known, standin.Settings(latency_s=0.0, mistakes=0.05)))
    with serving(app) as url:
        yield dspy.LM(
            "openai/standin-teacher", api_base=f"{url}/v1", api_key="none", cache=False, temperature=0.0
        )


@pytest.fixture(scope="module", params=["embedded", "ollama"])
def box(request: pytest.FixtureRequest, home: Path, teacher: dspy.LM) -> Iterator[Box]:
    if request.param == "embedded":
        with sorter(home, "embedded") as provider:
            yield Box(provider, "embedded", teacher, home, None)
        return
    engine = Llama()
    with OllamaDouble(home / "blobs", engine) as double, sorter(home, double.url) as provider:
        yield Box(provider, double.url, teacher, home, double)
    engine.close()


def sorter(home: Path, runtime: str) -> OllamaProvider:
    return OllamaProvider(TICKETS / "base", name="sorter", home=home, runtime=runtime, student=STUDENT)


def score(candidate: Any) -> float:
    evaluate = dspy.Evaluate(
        devset=examples(HELD_OUT), metric=right, num_threads=2, max_errors=100, failure_score=0.0
    )
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        return float(evaluate(candidate).score)


@pytest.fixture(scope="module")
def tuned(box: Box) -> Any:
    """BootstrapFinetune, as anyone would write it."""
    optimizer = dspy.BootstrapFinetune(metric=at_least(right, 1.0), num_threads=2)
    student = program(box.provider.lm(cache=False))
    return optimizer.compile(student, trainset=examples(TRAIN), teacher=program(box.teacher))


def test_bootstrap_finetune_learns(box: Box, tuned: Any, record_property: Record) -> None:
    assert tuned.lm.model.startswith("ollama_chat/sorter:")
    assert tuned.lm.kwargs["api_base"].endswith("/v1")
    before, after = score(program(box.provider.lm(cache=False))), score(tuned)
    record_property("scores", {"base": before, "tuned": after})
    assert before <= 10
    assert after >= before + 25


def test_what_the_metric_refused_was_not_learned(box: Box, tuned: Any) -> None:
    assert 160 <= len(box.learned(tuned)) < 192  # the stand-in teacher is wrong now and then


def test_one_model_a_predictor_where_dspy_is_told_so(box: Box) -> None:
    if box.runtime != "embedded":
        pytest.skip("once is enough: the rows decide what is trained, not the runtime")
    student, teacher = Both(), Both()
    student.set_lm(box.provider.lm())
    teacher.set_lm(box.teacher)
    optimizer = dspy.BootstrapFinetune(metric=right, multitask=False, train_kwargs={"epochs": 1})

    both = optimizer.compile(student, trainset=examples(slice(0, 16)), teacher=teacher)

    assert both.sort.lm.model != both.judge.lm.model
    for predictor, field in ((both.sort, "category"), (both.judge, "priority")):
        answers = [row["messages"][-1]["content"] for row in box.learned(predictor)]
        assert answers
        assert all(f"[[ ## {field} ## ]]" in answer for answer in answers)


@pytest.mark.parametrize("strategy", ["p -> w -> p", "w -> p"])
def test_better_together_alternates_and_trains_nothing_twice(
    strategy: str, box: Box, tuned: Any, record_property: Record
) -> None:
    prompts = dspy.BootstrapFewShot(
        metric=right, teacher_settings={"lm": box.teacher}, max_bootstrapped_demos=1, max_labeled_demos=1
    )
    weights = dspy.BootstrapFinetune(metric=at_least(right, 1.0), num_threads=2, exclude_demos=True)
    trained = box.trainings()
    best = dspy.BetterTogether(metric=right, p=prompts, w=weights).compile(
        program(box.provider.lm(cache=False)),
        trainset=examples(TRAIN),
        valset=examples(HELD_OUT),
        teacher=program(box.teacher),
        strategy=strategy,
        optimizer_compile_args={
            "p": {"teacher": None}
        },  # DSPy gives it a list otherwise, which it cannot take
        max_errors=1000,  # the base answers in no form at all, which DSPy counts as errors
        seed=0,
    )
    assert best.flag_compilation_error_occurred is False
    steps = {one["strategy"]: one["score"] for one in best.candidate_programs}
    record_property("scores", steps)
    letters = strategy.split(" -> ")
    assert set(steps) == {" -> ".join(letters[:count]) for count in range(len(letters) + 1)}
    assert steps[strategy.partition("w")[0] + "w"] >= steps[""] + 25
    assert box.trainings() == trained  # the same rows as above, in another order
    assert best.lm.model == tuned.lm.model
    best.lm.launch()  # BetterTogether ends by unloading
    assert score(best) >= steps[""] + 25


def test_ensemble_votes(box: Box, tuned: Any, record_property: Record) -> None:
    """Over two models that answer at one address, and a prompt with an example."""
    further = program(tuned.lm.finetune(box.learned(tuned), "chat", {"epochs": 1}).result())
    assert further.lm.model != tuned.lm.model
    assert read_json(box.run(further) / "train" / "summary.json")["base"] == box.provider.weights(
        tuned.lm.model
    )
    shown = dspy.LabeledFewShot(k=1).compile(program(tuned.lm), trainset=examples(TRAIN))
    shown.set_lm(tuned.lm)  # DSPy takes it away
    ballots: list[tuple[list[str], str]] = []

    def vote(outputs: list[Any]) -> Any:
        chosen = dspy.majority(outputs)
        ballots.append(([one.category for one in outputs], chosen.category))
        return chosen

    members = {"tuned": tuned, "further": further, "with an example": shown}
    voted = score(dspy.Ensemble(reduce_fn=vote).compile(list(members.values())))
    scores = {role: score(member) for role, member in members.items()}
    record_property("scores", scores | {"ensemble": voted})
    assert all(Counter(cast)[chosen] == max(Counter(cast).values()) for cast, chosen in ballots)
    assert len(ballots) >= 24  # DSPy drops the example where a member's answer cannot be read
    assert voted >= 25
    assert {name(tuned), name(further)} <= set(loaded(box))


def test_kill_unloads_and_launch_loads(box: Box, tuned: Any) -> None:
    tuned.lm.launch()
    assert name(tuned) in loaded(box)
    tuned.lm.kill()
    assert name(tuned) not in loaded(box)
    tuned.lm.kill()
    assert tuned(text=examples(HELD_OUT)[0].text).category  # the next question loads it again


def test_another_process_finds_the_model_again(box: Box, tuned: Any) -> None:
    asked = examples(HELD_OUT)[0].text
    with sorter(box.home, box.runtime) as other:
        found = other.lm(name(tuned), cache=False)
        assert found.model == tuned.lm.model
        assert program(found)(text=asked).category == tuned(text=asked).category


FINETUNE = """
import json, sys
from tests.e2e.test_provider import sorter
from pathlib import Path

rows = json.loads(Path(sys.argv[1]).read_text())
with sorter(Path(sys.argv[2]), "embedded") as provider:
    print(provider.weights(provider.lm(cache=False).finetune(rows, "chat").result().model))
"""


def test_a_finetune_that_was_killed_goes_on_from_its_checkpoint(box: Box, tuned: Any, tmp_path: Path) -> None:
    """kill -9 in the middle of it; called again it ends in the bytes of the one that was left alone."""
    if box.double:
        pytest.skip("the training is the same on every runtime")
    (tmp_path / "rows.json").write_text(json.dumps(box.learned(tuned)), encoding="utf-8")
    words = [sys.executable, "-c", FINETUNE, str(tmp_path / "rows.json"), str(tmp_path / "home")]
    killed = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: any(tmp_path.glob(f"home/**/checkpoint-*/{COMPLETE}")), killed, 600)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (spec,) = tmp_path.glob("home/**/train/work/spec.json")
    wait_until(lambda: not running(spec))  # the training process notices that its parent is gone
    left = read_jsonl(next(tmp_path.glob("home/**/metrics.jsonl")))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    again = Path(done.stdout.split()[-1])
    whole = Path(box.provider.weights(tuned.lm.model))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    metrics = read_jsonl(next(tmp_path.glob("home/**/metrics.jsonl")))
    kept = [row for row in left if row in metrics]
    assert len(kept) >= 1, "it began anew"


def name(candidate: Any) -> str:
    return str(candidate.lm.model).partition("/")[2]


def loaded(box: Box) -> list[str]:
    """Names of the models in memory."""
    if box.double:
        return list(box.double.loaded.values())
    models = box.provider.models
    assert isinstance(models, EmbeddedModels)
    return models.gateway.loaded


def test_a_removed_model_comes_back_without_training(box: Box, tuned: Any) -> None:
    if box.double is None:
        pytest.skip("nothing is registered outside the home")
    trained = box.trainings()
    gone = httpx.request("DELETE", f"{box.double.url}/api/delete", json={"model": name(tuned)})
    assert gone.status_code == httpx.codes.OK
    lm = box.provider.lm(cache=False).finetune(box.learned(tuned), "chat").result()
    assert lm.model == tuned.lm.model
    assert box.trainings() == trained
    assert program(lm)(text=examples(HELD_OUT)[0].text).category


class LocalWithoutServer(LocalProvider):  # type: ignore[misc]
    """DSPy's own, spared the SGLang that it unloads models with."""

    @staticmethod
    def kill(lm: dspy.LM, launch_kwargs: dict[str, Any] | None = None) -> None:
        """No server runs."""


def test_dspys_own_local_provider_does_not_start(
    teacher: dspy.LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline on the same data. When this fails, DSPy has mended it: measure it beside ours."""
    monkeypatch.setenv("DSPY_FINETUNEDIR", str(tmp_path))

    def compile_with(provider: dspy.Provider) -> None:
        student = program(dspy.LM(f"openai/local:{TICKETS / 'base'}", provider=provider))
        optimizer = dspy.BootstrapFinetune(metric=at_least(right, 1.0), num_threads=2)
        optimizer.compile(student, trainset=examples(TRAIN), teacher=program(teacher))

    with pytest.raises(ModuleNotFoundError, match="No module named 'sglang'"):
        compile_with(LocalProvider())
    with pytest.raises(ImportError, match="please install torch, transformers, and trl") as caught:
        compile_with(LocalWithoutServer())  # they are installed
    assert "cannot import name 'setup_chat_format' from 'trl'" in str(caught.value.__context__)
    with pytest.raises(ImportError, match="please install sglang"):
        dspy.LM(f"openai/local:{TICKETS / 'base'}", provider=LocalProvider()).launch()
    (saved,) = tmp_path.glob("*.jsonl")
    assert len(saved.read_text(encoding="utf-8").splitlines()) >= 160
