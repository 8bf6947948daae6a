"""The embedded runtime: llama.cpp in a supervised child process on a free loopback port.

    with Embedded(Path("model.gguf"), context=2048, alias="tickets:1") as endpoint:
        ...  # POST {endpoint.base_url}/chat/completions

The child (`serve.runtime.child`) ends itself when this process is gone, and is started again when
it crashes. Needs the `llama-cpp-python` package, which only the child imports.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import EmbeddedError

HOST = "127.0.0.1"
GRACE_S = 5.0
LONGEST_PAUSE_S = 30.0
KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
KEPT_PREFIXES = ("LANG", "LC_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "GGML_", "LLAMA_", "OMP_", "PYTHON")
READY = {
    "messages": [{"role": "user", "content": "Ready?"}],
    "max_tokens": 1,
    "temperature": 0,
    "logprobs": True,
}
"""Asked once before the model counts as started: loading proves less than answering."""

logger = logging.getLogger("serve")


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible server answers (`base_url` ends in /v1), and under which model name."""

    base_url: str
    model: str


class Embedded:
    """One GGUF served by a child process; a context manager, usable once.

    Args:
        gguf: the model file; its own Jinja chat template is used.
        adapter: a GGUF LoRA adapter for it.
        context: tokens of prompt and answer together.
        threads: of the computation; None: one less than there are cores. A thread that has to share
            its core makes the others wait for it: measured here, two on a busy machine of two cores
            took 80 times as long as one.
        alias: the model's name in answers.
        start_timeout: seconds for loading the file and the first answer.
        environment: of the child, cut down to what it needs.
    """

    def __init__(
        self,
        gguf: Path,
        *,
        context: int,
        threads: int | None = None,
        alias: str,
        adapter: Path | None = None,
        start_timeout: float = 600.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._gguf = gguf
        self._adapter = adapter
        self._context = context
        self._threads = threads or max(1, _cores() - 1)
        self._alias = alias
        self._start_timeout = start_timeout
        self._environment = _child_environment(os.environ if environment is None else environment)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._lines: deque[str] = deque(maxlen=50)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._supervisor: threading.Thread | None = None
        self.starts = 0
        """How often the child was started."""

    def __enter__(self) -> Endpoint:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def start(self) -> Endpoint:
        """Start the child and wait until it has answered once.

        Raises:
            EmbeddedError: the file is missing or is no model, or the child does not answer in time.
        """
        for file in filter(None, (self._gguf, self._adapter)):
            if not file.is_file():
                raise EmbeddedError(f"{file} does not exist; export the model again")
        self._port = _reserved_port()
        endpoint = Endpoint(f"http://{HOST}:{self._port.getsockname()[1]}/v1", self._alias)
        try:
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self._supervisor = threading.Thread(target=self._supervise, daemon=True, name="embedded-supervisor")
        self._supervisor.start()
        return endpoint

    def stop(self) -> None:
        """End the child and wait for it; safe to call again."""
        self._stopping.set()
        with self._lock:
            if self._process:
                _end(self._process)
        if self._supervisor:
            self._supervisor.join()
        if self._port:
            self._port.close()

    def _launch(self) -> None:
        config = {
            "gguf": str(self._gguf.resolve()),
            "adapter": str(self._adapter.resolve()) if self._adapter else None,
            "alias": self._alias,
            "context": self._context,
            "threads": self._threads,
            "port": self._port.getsockname()[1] if self._port else 0,
        }
        with self._lock:
            if self._stopping.is_set():
                return
            self.starts += 1
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.runtime.child", json.dumps(config)],
                stdin=subprocess.PIPE,  # never written: the child watches it to notice that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
            threading.Thread(target=self._keep_output, args=[self._process], daemon=True).start()

    def _keep_output(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                text = line.decode(errors="replace").strip()
                if text:
                    self._lines.append(text)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while self._process is not None and not self._stopping.is_set():
            try:
                code = self._process.wait(timeout=0.05)  # so a crash is noticed at once
            except subprocess.TimeoutExpired:
                pass
            else:
                raise EmbeddedError(f"the embedded runtime ended with code {code}: {self._last_line()}")
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"{self._gguf} did not answer within {self._start_timeout:g} s; the last it said: {self._last_line()}"
                )
            if self._answers(deadline - time.monotonic()):
                return

    def _answers(self, timeout: float) -> bool:
        """Whether it is up; refused connections mean not yet, a refused question is an error."""
        assert self._port is not None
        connection = http.client.HTTPConnection(HOST, self._port.getsockname()[1], timeout=max(0.1, timeout))
        try:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(READY), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if response.status != 200:
            raise EmbeddedError(
                f"{self._gguf} loads but answers HTTP {response.status}: {body[:300].decode(errors='replace')}; "
                "export the model again"
            )
        return True

    def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            assert self._process is not None
            began = time.monotonic()
            code = self._process.wait()
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - began > LONGEST_PAUSE_S else failures + 1
            logger.error("the embedded runtime ended with code %s: %s", code, self._last_line())
            _end(self._process)
            if self._stopping.wait(min(LONGEST_PAUSE_S, 0.1 * 2.0 ** (failures - 1)) if failures else 0):
                return
            self._restart()

    def _restart(self) -> None:
        try:
            self._launch()
            self._wait_until_ready()
        except (
            EmbeddedError,
            OSError,
            RuntimeError,
        ) as error:  # no memory, descriptor or thread is left just now
            logger.error("the embedded runtime did not come back: %s", error)
            if self._process:
                _end(self._process)
        else:
            logger.warning("the embedded runtime is back")

    def _last_line(self) -> str:
        return self._lines[-1][-500:] if self._lines else "it said nothing"


def _end(process: subprocess.Popen[Any]) -> None:
    """Close its standard input, on which it ends by itself; kill it by its pid when it does not."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reserved_port() -> socket.socket:
    """A free port, bound but not listened on: nobody else gets it, the child may share it."""
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind((HOST, 0))
    return reserved


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a computation needs; no keys, no proxies."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
    }
    package = str(Path(__file__).resolve().parents[2])  # where `serve` is, installed or not
    paths = [package, *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
