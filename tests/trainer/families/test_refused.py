"""A base that cannot be carried through is refused before the teacher is asked and before weights are fetched."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.servers import serving
from tests.tasks import write_task
from tests.trainer.families import encoder_decoders
from trainer import preflight, process, task
from trainer.conversion import t5
from trainer.errors import PreflightError, TrainError
from trainer.runs import Home, Run
from trainer.traces import Store

RESOLVE = """
import sys
from pathlib import Path
from typing import Any
from trainer import task
from trainer.runs import Home, Run
from trainer.traces import Store
from trainer.training import base

folder = Path(sys.argv[1])
base.resolve(Run(task.load(folder), Home(folder), Store.open("sqlite://"), folder / "run", environment={}))
"""


def faults(tmp_path: Path, student: dict[str, Any], local: str = "embedded") -> list[str]:
    """What preflight says of a T5 base with these settings."""
    folder = write_task(tmp_path / "task", student={"base": "./base", **student})
    encoder_decoders.write(encoder_decoders.FLAN, folder / "base")
    home = Home(tmp_path / "home")
    environment = {"HOMESTILL_LOCAL": local}
    loaded, store = task.load(folder), Store.open("sqlite://")
    run = Run(loaded, home, store, home.runs("words") / "r", environment=environment)
    with pytest.raises(PreflightError) as error:
        preflight.check(run)
    return [fault for fault in error.value.faults if "base" in fault]


def test_what_cannot_serve_t5_is_refused_before_the_teacher_is_asked(tmp_path: Path) -> None:
    (server,) = faults(tmp_path, {}, "http://127.0.0.1:9/v1")
    assert "an encoder-decoder, which http://127.0.0.1:9/v1 does not serve" in server
    assert "set HOMESTILL_LOCAL to embedded" in server


def test_t5_takes_no_soft_prompt(tmp_path: Path) -> None:
    assert (
        "student.method is 'prompt', and llama.cpp serves t5 models only"
        in faults(tmp_path, {"method": "prompt"})[0]
    )


def test_t5_without_its_pieces(tmp_path: Path) -> None:
    folder = encoder_decoders.write(encoder_decoders.FIRST, tmp_path / "base")
    (folder / "spiece.model").unlink()
    with pytest.raises(
        TrainError, match=r"holds no spiece\.model, from which T5's tokenizer is read; add the file"
    ):
        t5.ready(folder, tmp_path / "cache")


def test_a_hub_model_is_refused_by_its_configuration_alone(tmp_path: Path) -> None:
    asked: list[str] = []

    async def file(request: Request) -> Response:
        asked.append(request.url.path)
        return JSONResponse(
            {"architectures": ["MT5ForConditionalGeneration"]},
            headers={"ETag": '"1"', "X-Repo-Commit": "0" * 40},
        )

    hub = Starlette(routes=[Route("/{path:path}", file, methods=["GET", "HEAD"])])
    folder = write_task(tmp_path / "task", student={"base": "somebody/small-mt5"})
    with serving(hub) as address:
        online = {name: value for name, value in os.environ.items() if name not in process.OFFLINE}
        environment = {**online, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        done = process.run([sys.executable, "-c", RESOLVE, str(folder)], timeout=120, environment=environment)
    assert "TrainError: somebody/small-mt5 has the architecture MT5ForConditionalGeneration" in done.last_line
    assert {path for path in asked if "small-mt5" in path} == {"/somebody/small-mt5/resolve/main/config.json"}
