"""Who holds the GPU: torch must find one where one is required, and Ollama lets go of it before a training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import httpx

from trainer import process
from trainer.errors import PreflightError, RuntimeUnavailable
from trainer.pipeline import Stage
from trainer.runs import Run
from trainer.runtimes.choice import choice, ollama
from trainer.runtimes.ollama import Loaded
from trainer.seam import gpu_required

UNLOAD_S = 60.0
CHECK_S = 180.0

log = logging.getLogger("homestill.gpu")


def freeing(stage: Stage) -> Stage:
    """The stage `train` with Ollama's models taken out of the GPU before it starts; any other stage as it is.

    Asked again while the training runs, a model comes back to what is free; when the training ends, its process
    is gone and so is all that it held.
    """
    if stage.name != "train":
        return stage

    def run(run: Run) -> None:
        names = unload(run.environment)
        if names:
            log.warning("taken out of Ollama's memory: %s", ", ".join(names))
        stage.run(run)

    return replace(stage, run=run)


def unload(environment: Mapping[str, str], transport: httpx.BaseTransport | None = None) -> list[str]:
    """Take every model that Ollama holds in memory out of it; their names. None where Ollama is not the runtime.

    An Ollama that cannot be reached holds nothing that we could free: it is said, and the run goes on.
    """
    if choice(environment) != "ollama":
        return []
    try:
        loaded = ollama(environment, transport=transport, create_timeout=UNLOAD_S).unload_all()
    except RuntimeUnavailable as error:
        log.warning("Ollama could not be asked to free the GPU: %s", error)
        return []
    if gpu_required(environment):
        _say_where(loaded)
    return [model.name for model in loaded]


def _say_where(loaded: list[Loaded]) -> None:
    """Loudly, for each model that is not wholly on the GPU."""
    for model in loaded:
        if model.vram < model.size:
            log.warning(
                "ATTENTION: Ollama runs %s on the CPU, in whole or in part (%d of %d bytes on the GPU); "
                "give its container the GPU, or train a smaller model",
                *(model.name, model.vram, model.size),
            )


def cuda_works() -> bool:
    """Whether torch can use a GPU; asked in a process of its own, which holds nothing of it afterwards."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return process.run([sys.executable, "-c", code], timeout=CHECK_S).code == 0


def check(environment: Mapping[str, str], cuda: Callable[[], bool] = cuda_works) -> None:
    """Raise PreflightError where a GPU is required and torch cannot use one."""
    if gpu_required(environment) and not cuda():
        raise PreflightError(
            [
                "HOMESTILL_REQUIRE_GPU is set, and torch finds no CUDA device: this container would train on the CPU; "
                "install the NVIDIA container toolkit and look at `docker run --rm --gpus all IMAGE nvidia-smi`, "
                "or lay docker/cpu.yaml over compose.yaml; outside a container, unset it"
            ]
        )
