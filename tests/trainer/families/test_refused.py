"""A base that cannot be carried through is refused before the teacher is asked and before weights are fetched."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import T5Config, T5ForConditionalGeneration

from tests.servers import serving
from tests.tasks import write_task
from trainer import preflight, process, task
from trainer.errors import PreflightError
from trainer.runs import Home, Run
from trainer.traces import Store

RESOLVE = """
import sys
from pathlib import Path
from trainer import task
from trainer.runs import Home, Run
from trainer.traces import Store
from trainer.training import base

folder = Path(sys.argv[1])
base.resolve(Run(task.load(folder), Home(folder), Store.open("sqlite://"), folder / "run", environment={}))
"""


def test_t5_is_refused_before_the_teacher_is_asked(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "task", student={"base": "./base"})
    small = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(folder / "base")
    home = Home(tmp_path / "home")
    run = Run(task.load(folder), home, Store.open("sqlite://"), home.runs("words") / "r", environment={})
    with pytest.raises(PreflightError) as error:
        preflight.check(run)
    (reason,) = [fault for fault in error.value.faults if "base has the architecture" in fault]
    assert "T5ForConditionalGeneration: it reads the prompt with an encoder and has no chat format" in reason
    assert "use a base of Llama 2 and 3" in reason


def test_a_hub_model_is_refused_by_its_configuration_alone(tmp_path: Path) -> None:
    asked: list[str] = []

    async def file(request: Request) -> Response:
        asked.append(request.url.path)
        return JSONResponse(
            {"architectures": ["T5ForConditionalGeneration"]},
            headers={"ETag": '"1"', "X-Repo-Commit": "0" * 40},
        )

    hub = Starlette(routes=[Route("/{path:path}", file, methods=["GET", "HEAD"])])
    folder = write_task(tmp_path / "task", student={"base": "somebody/small-t5"})
    with serving(hub) as address:
        online = {name: value for name, value in os.environ.items() if name not in process.OFFLINE}
        environment = {**online, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        done = process.run([sys.executable, "-c", RESOLVE, str(folder)], timeout=120, environment=environment)
    assert "TrainError: somebody/small-t5 has the architecture T5ForConditionalGeneration" in done.last_line
    assert {path for path in asked if "small-t5" in path} == {"/somebody/small-t5/resolve/main/config.json"}
