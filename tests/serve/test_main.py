"""`python -m serve` as a process of its own, and what importing it costs."""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

import serve
from serve.records.journal import Journal
from tests.serve.endpoint_support import lab, question, teacher_model

FORBIDDEN = ["torch", "transformers", "sklearn", "dspy", "litellm", "trainer", "trl", "openai"]
CHILD_ONLY = {"serve.runtime.child", "serve.runtime.generation"}
"""Modules of the embedded runtime's process, which import llama.cpp."""


def test_importing_serve_pulls_in_nothing_heavy() -> None:
    found = {module.name for module in pkgutil.walk_packages(serve.__path__, "serve.")}
    assert {"serve.app", "serve.routing.router", "serve.runtime.embedded", *CHILD_ONLY} <= found
    names = sorted(found - CHILD_ONLY)
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set({[*FORBIDDEN, "llama_cpp"]!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_serves_and_ends_cleanly_with_its_journal(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOMESTILL_HOME": str(tmp_path / "home"),
        "HOMESTILL_TEACHER_API_BASE": f"{lab().address(teacher_model())}/v1",
        "NO_PROXY": "127.0.0.1",
    }
    args = [sys.executable, "-m", "serve", "--port", "0"]
    root = Path(serve.__file__).parents[1]
    with subprocess.Popen(args, env=environment, cwd=root, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        found = (re.search(r"running on (http://\S+)", line) for line in server.stderr)
        url = next(match.group(1) for match in found if match)
        assert httpx.get(f"{url}/healthz").json()["status"] == "ok"
        answer = httpx.post(f"{url}/v1/chat/completions", json=question(), timeout=30)
        assert answer.json()["homestill"]["reason"] == "no_release"
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
    assert server.returncode == 0
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0
    journal = Journal(f"sqlite:///{tmp_path / 'home' / 'journal.db'}")
    try:
        assert [entry.reason for _, entry in journal.entries()] == ["no_release"]
    finally:
        journal.close()
