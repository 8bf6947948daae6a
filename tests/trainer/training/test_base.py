"""A base from a hub: fetched once, and only what is missing asks for room or a network."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.servers import serving
from tests.tasks import write_task
from tests.tiny import tiny_base
from trainer import process

COMMIT = "0" * 40
RESOLVE = """
import sys
from pathlib import Path
from trainer import task
from trainer.runs import Home, Run
from trainer.traces import Store
from trainer.training import base

folder, free = Path(sys.argv[1]), int(sys.argv[2])
loaded, store = task.load(folder), Store.open("sqlite://")
run = Run(loaded, Home(folder), store, folder / "run", environment={}, disk_free=lambda _: free)
print(base.resolve(run))
"""


class Hub:
    """A double of the model hub that has one model; remembers which files were fetched."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        self._files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.app = Starlette(
            routes=[
                Route("/api/models/some/base/tree/{revision}", self._tree),
                Route("/api/models/{path:path}", self._info),
                Route("/some/base/resolve/{revision}/{file}", self._file, methods=["GET", "HEAD"]),
            ]
        )

    async def _info(self, _: Request) -> Response:
        files = [{"rfilename": name, "size": len(data)} for name, data in self._files.items()]
        return JSONResponse({"id": "some/base", "sha": COMMIT, "siblings": files})

    async def _tree(self, _: Request) -> Response:
        return JSONResponse(
            [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in self._files.items()
            ]
        )

    async def _file(self, request: Request) -> Response:
        name = request.path_params["file"]
        if name not in self._files:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        data = self._files[name]
        if request.method == "GET":
            self.fetched.append(name)
        etag = hashlib.sha256(data).hexdigest()
        return Response(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


def resolve(tmp_path: Path, address: str, free: int) -> process.Done:
    """Resolve the base in a process of its own, for the hub's client reads its settings when it is imported."""
    folder = write_task(tmp_path / "task", student={"base": "some/base"})
    online = {name: value for name, value in os.environ.items() if name not in process.OFFLINE}
    environment = {**online, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
    return process.run(
        [sys.executable, "-c", RESOLVE, str(folder), str(free)], timeout=120, environment=environment
    )


@pytest.mark.slow
def test_a_base_is_fetched_once_and_then_needs_neither_room_nor_the_hub(tmp_path: Path) -> None:
    hub = Hub(tiny_base(tmp_path / "base"))
    with serving(hub.app) as address:
        full = resolve(tmp_path, address, free=1_000)
        assert "DiskError: downloading some/base needs 0.00 GB below" in full.last_line
        assert "point HF_HOME at a larger disk" in full.last_line
        assert "model.safetensors" not in hub.fetched
        first = resolve(tmp_path, address, free=10**9)
        assert first.code == 0, first.output
        assert hub.fetched.count("model.safetensors") == 1
        again = resolve(tmp_path, address, free=0)
    without = resolve(tmp_path, address, free=0)
    folder = first.last_line
    assert {"config.json", "model.safetensors"} <= {file.name for file in Path(folder).iterdir()}
    assert [again.last_line, without.last_line] == [folder, folder]
    assert hub.fetched.count("model.safetensors") == 1
