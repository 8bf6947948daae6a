"""The exported GGUF is the trained model: its tokens, its template, its answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_base
from tests.tiny_run import tiny_run
from tests.trainer.conversion.test_adapter import write_adapter
from trainer import export
from trainer.conversion.check import faults
from trainer.errors import DiskError, ExportError
from trainer.runs import Run, read_json, sha256_file, write_json
from trainer.settings import StudentSettings
from trainer.template import GOLDEN, Template
from trainer.training import base as bases


def untrained_run(root: Path, *, hidden: int = 64, quantize: str = "q8_0", **options: Any) -> Run:
    """A run whose train stage is done; the student's random weights differ from the base's."""
    try:
        export.converter({})
    except ExportError as error:
        pytest.skip(str(error))
    run = tiny_run(root, quantize=quantize, **options)
    base, model = root / "task" / "base", run.folder / "train" / "model"
    shutil.rmtree(base)
    tiny_base(base, hidden=hidden)
    student: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    student.save_pretrained(model)
    bases.complete(model, base, Template.freeze(AutoTokenizer.from_pretrained(base)))
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = untrained_run(tmp_path_factory.mktemp("exported"))
    export.run(run)
    return run


def test_files_and_summary(exported: Run) -> None:
    folder = exported.stage("export")
    assert {file.name for file in folder.iterdir()} == {
        "model.gguf",
        "base.gguf",
        "summary.json",
        "export.log",
    }
    summary = read_json(folder / "summary.json")
    for name in ("model", "base"):
        file = folder / f"{name}.gguf"
        assert summary[name] == {
            "sha256": sha256_file(file),
            "bytes": file.stat().st_size,
            "quantization": "q8_0",
        }
    assert summary["model"]["sha256"] != summary["base"]["sha256"]
    model = exported.folder / "train" / "model"
    assert Template.from_json(summary["template"]) == Template.freeze(AutoTokenizer.from_pretrained(model))


def test_the_base_is_kept_for_the_next_run(exported: Run) -> None:
    (cached,) = (exported.home.cache / "base-gguf").iterdir()
    assert cached.samefile(exported.stage("export") / "base.gguf")


def test_tokens_and_logits_are_those_of_the_trained_model(exported: Run) -> None:
    from llama_cpp import Llama

    model = exported.folder / "train" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = Template.freeze(tokenizer)
    served = Llama(str(exported.stage("export") / "model.gguf"), n_ctx=512, logits_all=True, verbose=False)
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for messages in GOLDEN:
        ids = template.prompt_ids(tokenizer, messages)
        text = template.render(messages, add_generation_prompt=True)
        assert served.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert served.tokenize(text.removeprefix(template.bos).encode(), add_bos=True, special=True) == ids
        served.reset()
        served.eval(ids)
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids])).logits[0].numpy()
        assert np.corrcoef(served.scores[: len(ids)].ravel(), expected.ravel())[0, 1] > 0.999
    assert served.token_eos() == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    served.close()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope.freq_base is 500000.0, the model's is 10000.0"),
        ({"vocab_size": 7}, "the model has 7"),
    ],
)
def test_what_differs_from_the_model_is_found(
    exported: Run, tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    gguf, model = exported.stage("export") / "model.gguf", exported.folder / "train" / "model"
    template = Template.freeze(AutoTokenizer.from_pretrained(model))
    assert faults(gguf, model, template) == []
    write_json(tmp_path / "config.json", read_json(model / "config.json") | change)
    (found,) = faults(gguf, tmp_path, template)
    assert fault in found


def test_another_template_is_found(exported: Run) -> None:
    gguf, model = exported.stage("export") / "model.gguf", exported.folder / "train" / "model"
    template = Template.freeze(AutoTokenizer.from_pretrained(model))
    other = Template(template.jinja + " ", "", ["never"], {})
    assert faults(gguf, model, other) == [
        "the chat template is not the frozen one",
        "never does not end an answer",
        "a beginning-of-text token is put in front of a prompt that was trained without one",
    ]


def test_rope_scaling_and_tied_embeddings_are_looked_for(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    model = tiny_base(tmp_path / "base")
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_rope_freq_base(500000.0)
    writer.add_tensor("output.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = faults(tmp_path / "m.gguf", model, Template.freeze(AutoTokenizer.from_pretrained(model)))
    assert any("rope_freqs is missing" in each for each in found)
    assert any("output.weight" in each for each in found)
    assert any("there are 0 tokens" in each for each in found)
    assert any("is not put in front of a prompt" in each for each in found)


def test_a_missing_converter_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds no convert_hf_to_gguf.py.*run scripts/install"):
        export.converter({"HOMESTILL_LLAMA_CPP": str(tmp_path)})


def test_no_space_is_said_before_anything_is_converted(tmp_path: Path) -> None:
    run = untrained_run(tmp_path, disk_free=lambda _: 1_000_000)
    with pytest.raises(DiskError, match="export needs"):
        export.run(run)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["f16", "q4_k_m"])
def test_the_other_quantisations_and_the_cached_base(tmp_path: Path, quantize: str) -> None:
    run = untrained_run(tmp_path, hidden=256, quantize=quantize)
    export.run(run)
    base = run.stage("export") / "base.gguf"
    before = (base.stat().st_ino, sha256_file(run.stage("export") / "model.gguf"))
    shutil.rmtree(run.stage("export"))
    export.run(run)
    assert (run.stage("export") / "export.log").read_text().count("successfully exported") == 1
    assert (base.stat().st_ino, sha256_file(run.stage("export") / "model.gguf")) == before


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    run = untrained_run(tmp_path)
    for folder in (tmp_path / "task" / "base", run.folder / "train" / "model"):
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("{1,3}", "{1,2}"))
    with pytest.raises(ExportError, match=r"BPE pre-tokenizer was not recognized.*export\.log"):
        export.run(run)
    assert not (run.stage("export") / "base.gguf").exists()


@pytest.fixture
def apart(tmp_path: Path) -> Run:
    """A run that is to deliver an adapter, with a random one."""
    run = untrained_run(tmp_path, method="lora\n  deliver: adapter")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "task" / "base", dtype=torch.float32)
    write_adapter(run.folder / "train" / "adapter", base)
    return run


@pytest.mark.slow
def test_an_adapter_is_delivered_beside_a_base_that_all_tasks_share(apart: Run) -> None:
    export.run(apart)
    folder = apart.stage("export")
    assert {file.name for file in folder.iterdir()} == {
        "adapter.gguf",
        "base.gguf",
        "summary.json",
        "export.log",
    }
    summary = read_json(folder / "summary.json")
    assert summary["deliver"] == "adapter"
    assert summary["model"]["sha256"] == sha256_file(folder / "adapter.gguf")
    (cached,) = (apart.home.cache / "base-gguf").iterdir()
    first = summary["model"]["sha256"]
    assert cached.samefile(folder / "base.gguf")
    shutil.rmtree(folder)
    export.run(apart)
    assert cached.samefile(folder / "base.gguf"), "the second task on this base takes no disk for it"
    assert read_json(folder / "summary.json")["model"]["sha256"] == first
    assert (folder / "export.log").read_text().count("successfully exported") == 1, "the adapter alone"


def test_what_can_only_be_served_merged_is_refused(apart: Run) -> None:
    folder = apart.folder / "train" / "adapter"
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | {"use_dora": True})
    with pytest.raises(ExportError, match=r"use_dora is true.*set student\.deliver to merged"):
        export.run(apart)
    shutil.rmtree(folder)
    with pytest.raises(ExportError, match="holds no adapter to deliver"):
        export.run(apart)


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_a_method_without_an_adapter_cannot_deliver_one(method: str) -> None:
    with pytest.raises(ValueError, match=f"student.method {method} trains none; use lora or qlora"):
        StudentSettings.model_validate({"method": method, "deliver": "adapter"})
