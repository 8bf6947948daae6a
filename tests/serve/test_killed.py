"""`python -m serve` killed twenty times under load: nothing that was acknowledged is lost, and no cap is passed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import serve
from serve.config import Config
from serve.guard.budget import Budget
from serve.records.journal import Journal
from tests.serve.endpoint_support import TEACHER_USAGE, lab, question, teacher_model

KILLS = 20
PRICE = {"input": 2.0, "output": 10.0}
COST = (
    PRICE["input"] * TEACHER_USAGE["prompt_tokens"] + PRICE["output"] * TEACHER_USAGE["completion_tokens"]
) / 1e6
CAP = 0.25


@contextmanager
def server(home: Path, teacher: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOMESTILL_HOME": str(home),
        "HOMESTILL_TEACHER_API_BASE": f"{teacher}/v1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "serve", "--port", "0"]
    root = Path(serve.__file__).parents[1]
    with subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        found = (re.search(r"running on (http://\S+)", line) for line in child.stderr)
        yield child, next(match.group(1) for match in found if match)
        child.kill()
        child.stderr.close()


def load(url: str, acknowledged: set[str], refused: list[int]) -> None:
    """Ask until the server is gone."""
    with httpx.Client(base_url=url, timeout=30) as client:
        try:
            while True:
                response = client.post("/v1/chat/completions", json=question(max_tokens=20))
                if response.status_code == 200:
                    acknowledged.add(response.headers["x-request-id"])
                else:
                    refused.append(response.status_code)
        except httpx.TransportError:
            return


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_and_no_cap_is_passed(tmp_path: Path) -> None:
    teacher = teacher_model()
    address = lab().address(teacher)
    (tmp_path / "serve.yaml").write_text(json.dumps({"daily_usd": CAP, "prices": {"tickets": PRICE}}))
    acknowledged: set[str] = set()
    refused: list[int] = []
    chance = random.Random(7)
    for _ in range(KILLS):
        with server(tmp_path, address) as (child, url):
            asking = [threading.Thread(target=load, args=(url, acknowledged, refused)) for _ in range(4)]
            for each in asking:
                each.start()
            threading.Event().wait(chance.uniform(0.05, 0.4))  # whatever it is doing at that moment
            child.kill()
            for each in asking:
                each.join()
    journal = Journal(f"sqlite:///{tmp_path / 'journal.db'}")
    try:
        found = [entry.id for _, entry in journal.entries(limit=1_000_000) if entry.status == 200]
    finally:
        journal.close()
    assert len(found) == len(set(found))
    assert acknowledged <= set(found)
    budget = Budget(tmp_path / "budget.db", Config(daily_usd=CAP))
    paid = len(teacher.asked) * COST
    assert len(acknowledged) > KILLS
    assert paid <= budget.spent_usd() + 1e-9 <= CAP + 2e-9
    assert set(refused) <= {429}
