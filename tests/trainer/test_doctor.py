"""Every sentence that doctor can say about a machine, without that machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.contract import files
from tests.contract.ollama_double import OllamaDouble
from tests.tiny_run import tiny_run
from tests.trainer.runtimes.test_ollama import model_of
from trainer.doctor import (
    Finding,
    Probes,
    examine,
    examine_task,
    gpu,
    loaded_models,
    ollama_memory,
    unload_models,
)
from trainer.machine import Card, Machine, Tool, Torch, cards, torch_facts
from trainer.process import Done
from trainer.runs import Home
from trainer.runtimes.ollama import Loaded, Ollama

GB = 10**9
CARD = Card("NVIDIA L4", 24 * GB, 1 * GB, "550.54.15")
CPU_TORCH = Torch("2.13.0+cpu", None, available=False)
CUDA_TORCH = Torch("2.13.0+cu128", "12.8", available=False)


def said(finding: Finding) -> str:
    return f"{finding.state}: {finding.text}"


@pytest.mark.parametrize(
    ("found", "torch", "environment", "expected"),
    [
        ([], CPU_TORCH, {}, "note: none; training runs on the CPU"),
        ([CARD], CPU_TORCH, {}, "torch 2.13.0+cpu is built for CPUs alone: run scripts/install --gpu."),
        (
            [Card("GRID K1", GB, 0, "470.82.01")],
            CUDA_TORCH,
            {},
            "driver 470.82.01 is too old for torch's CUDA 12.8: install NVIDIA's driver 525 or newer",
        ),
        (
            [CARD],
            CUDA_TORCH,
            {},
            "CUDA 12.8 cannot start on it: restart the machine after a driver update; in a",
        ),
        ([CARD], CUDA_TORCH, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides it: unset"),
        (
            [CARD],
            Torch("", None, available=False, fault="libcudart.so.12: cannot open shared object file"),
            {},
            "torch cannot be loaded (libcudart.so.12: cannot open shared object file): run scripts/install --gpu",
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch",
            CUDA_TORCH,
            {},
            "version mismatch): reboot",
        ),
        (
            [CARD],
            Torch("2.13.0", "12.8", available=True, name="NVIDIA L4", total=24 * GB, free=20 * GB),
            {},
            "ok: NVIDIA L4, 20 GB of 24 GB free, ",
        ),
    ],
)
def test_why_a_card_is_not_used(
    found: list[Card] | str, torch: Torch, environment: dict[str, str], expected: str
) -> None:
    assert expected in said(gpu(found, torch, environment))


@pytest.mark.parametrize(
    ("loaded", "found", "expected"),
    [
        ([], [CARD], []),
        ([Loaded("a:1", GB, GB)], [CARD], []),
        (
            [Loaded("a:1", 15 * GB, 15 * GB), Loaded("b:2", GB, GB)],
            [Card("NVIDIA L4", 24 * GB, 17 * GB, "550")],
            [
                "a:1, b:2 holds 16 GB of the card's 24 GB, 7.0 GB are free for training; unload before you train: "
                "homestill doctor --unload"
            ],
        ),
        ([Loaded("a:1", GB, 0)], [CARD], ["a:1 runs on the CPU although NVIDIA L4 is here"]),
        ([Loaded("a:1", GB, 0)], [], []),
        ([Loaded("a:1", 4 * GB, GB)], [CARD], ["a:1 lies to 25% on the card"]),
    ],
)
def test_what_ollama_holds_and_where(loaded: list[Loaded], found: list[Card], expected: list[str]) -> None:
    texts = [finding.text for finding in ollama_memory(loaded, found)]
    assert len(texts) == len(expected)
    for text, part in zip(texts, expected, strict=True):
        assert part in text


def answering(code: int, output: str) -> tuple[list[Sequence[str]], Tool]:
    asked: list[Sequence[str]] = []

    def run(words: Sequence[str], timeout: float) -> Done:
        asked.append(words)
        return Done(list(words), code, output)

    return asked, run


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (127, "", []),
        (
            0,
            "NVIDIA L4, 23034, 512, 550.54.15\nNVIDIA L4, 23034, [N/A], 550.54.15\n",
            [
                Card("NVIDIA L4", 23034 * 2**20, 512 * 2**20, "550.54.15"),
                Card("NVIDIA L4", 23034 * 2**20, 0, "550.54.15"),
            ],
        ),
        (9, "NVIDIA-SMI has failed", "NVIDIA-SMI has failed"),
        (0, "No devices were found", "No devices were found"),
    ],
)
def test_what_nvidia_smi_says(code: int, output: str, expected: object) -> None:
    asked, run = answering(code, output)
    assert cards(run) == expected
    assert asked[0][0] == "nvidia-smi"


def test_what_torch_says() -> None:
    _, run = answering(0, 'a warning\n{"version": "2.13.0", "cuda": null, "available": false}')
    assert torch_facts(run) == Torch("2.13.0", None, available=False)
    _, run = answering(1, "Traceback\nImportError: libcudart.so.12")
    assert torch_facts(run).fault == "ImportError: libcudart.so.12"


def test_the_machine_is_the_card_that_torch_can_use(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    usable = Torch("2.13.0", "12.8", available=True, name="NVIDIA L4", total=24, free=20, flops=1e14)
    environment = {"PATH": str(tmp_path)}
    assert Machine.here(environment, lambda: usable) == Machine("cuda", "NVIDIA L4", 24, 20, 1e14)
    assert Machine.here(environment, lambda: CPU_TORCH).kind == "cpu"
    here = Machine.here({"PATH": ""}, lambda: usable)
    assert here.kind == "cpu"
    assert here.memory >= here.free > 0
    assert here.flops > 1e9


def test_ollama_gives_its_memory_back(tmp_path: Path) -> None:
    with OllamaDouble(tmp_path / "blobs") as double:
        ollama = Ollama(double.url)
        name = ollama.register(model_of(files.shell(tmp_path / "m.gguf"))).name
        for double.on_gpu in (False, True):
            ollama.load(name, 60)
            assert unload_models({}) == [], "no Ollama is named"
            (held,) = unload_models({"OLLAMA_HOST": double.url})
            assert held.vram == (held.size if double.on_gpu else 0)
            assert ollama.loaded() == []
        ollama.unload("gone:1")


def test_everything_is_looked_at_in_one_go(tmp_path: Path) -> None:
    probes = Probes(
        cards=lambda: [CARD],
        torch=lambda: CPU_TORCH,
        loaded=lambda _: [Loaded("a:1", GB, 0)],
        memory=lambda: 2 * GB,
    )
    found = {finding.name: finding for finding in examine(Home(tmp_path), {}, probes)}
    assert {"torch", "converter", "GPU", "runtime: embedded", "Ollama's speed", "memory", "disk"} <= set(
        found
    )
    assert "2.0 GB free" in found["memory"].text
    assert found["memory"].state == "note"
    assert loaded_models({}) == []
    assert loaded_models({"OLLAMA_HOST": "127.0.0.1:9"}) == []


def test_a_task_is_estimated(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, disk_free=lambda _: 1)
    found = {finding.name: finding for finding in examine_task(run)}
    assert found["training"].text.startswith("lora of ./base: 32.8 thousand of 96.8 thousand parameters")
    assert found["training: memory"].state == "ok"
    assert "it fits" in found["training: memory"].text
    assert "40 rows" in found["training: time"].text
    assert found["training: disk"].state == "missing", "a byte is too little"
    (run.task.folder / "base" / "config.json").unlink()
    (fault,) = examine_task(run)
    assert (fault.state, "holds no config.json" in fault.text) == ("missing", True)
