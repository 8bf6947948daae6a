"""Tasks with releases on disk, and requests that ended, for the tests of everything that watches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve import release as releases
from serve.records.entry import Entry
from serve.release import content_hash
from serve.tasks import Served

DIGEST = hashlib.sha256(b"weights").hexdigest()
THRESHOLD = 0.836
SCORES = {
    "teacher": {"mean": 0.974, "low": 0.952, "high": 0.986, "n": 350, "failures": 0},
    "base": {"mean": 0.11, "low": 0.08, "high": 0.15, "n": 350, "failures": 210},
    "student": {"mean": 0.88, "low": 0.842, "high": 0.91, "n": 350, "failures": 0},
    "hybrid": {"mean": 0.977, "low": 0.956, "high": 0.988, "n": 350, "failures": 0},
}


@dataclass
class Shelf:
    """What `Tasks` shows of itself, over releases that lie on disk."""

    folder: Path
    served: dict[str, Served] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def take_up(self, task: str) -> None:
        """Serve what `current` names."""
        found = releases.current(self.folder / task)
        assert found is not None
        self.served[task] = Served(found, None, None, None, None, {})


def entry(**values: Any) -> Entry:
    """A local answer that was kept, but for what is said."""
    given: dict[str, Any] = {
        "id": "req_1",
        "asked": "tickets",
        "messages": [{"role": "user", "content": "a secret of the client"}],
        "answer": {"role": "assistant", "content": "a secret of the model"},
        "status": 200,
        "latency_ms": 50.0,
        "overhead_ms": 0.4,
        "task": "tickets",
        "release": "20261120T221500Z-1a2b3c4d",
        "route": "local",
        "reason": "confident",
        "confidence": 0.93,
        "threshold": THRESHOLD,
        "guarantee": "0.95@0.95",
        "model": "tickets:1a2b3c4d",
        "prompt_tokens": 300,
        "completion_tokens": 20,
        "cost_usd": 0.0,
        "key": "alice",
        "egress": "allow",
        "strategy": "certified",
        "endpoint": "chat",
        "first_token_ms": 12.0,
        "created": "2026-11-20T22:15:00.500+00:00",
    }
    return Entry(**given | values)


def by_teacher(**values: Any) -> Entry:
    """An answer of the teacher to what the local model was not sure of."""
    given: dict[str, Any] = {
        "route": "teacher",
        "reason": "low_confidence",
        "confidence": 0.41,
        "guarantee": "none",
        "model": "gpt-4o-2026",
        "cost_usd": 0.0021,
        "latency_ms": 640.0,
        "first_token_ms": 210.0,
    }
    return entry(**given | values)


def write_release(
    folder: Path,
    *,
    stamp: str = "20261120T221500Z",
    task: str = "tickets",
    certified: bool = True,
    report: str = "<!doctype html><title>A report</title><p>All is well.",
) -> str:
    """Write a release with scores and a report, and make it the current one; its version."""
    router = _router(task, certified)
    contents = {
        "model.gguf": b"weights",
        "router.json": json.dumps(router).encode(),
        "report.html": report.encode(),
        "task.yaml": f"name: {task} # {stamp}\n".encode(),
    }
    digests = {name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in contents.items()}
    version = f"{stamp}-{content_hash(digests)}"
    target = folder / task / version
    target.mkdir(parents=True)
    for name, data in contents.items():
        (target / name).write_bytes(data)
    manifest = _manifest(task, version, router) | {"files": digests}
    (target / "manifest.json").write_text(json.dumps(manifest))
    partial = folder / task / ".current.partial"
    partial.write_text(f"{version}\n")
    partial.replace(folder / task / "current")
    return version


def _router(task: str, certified: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": task,
        "binds": {
            "model": DIGEST,
            "quantization": "q8_0",
            "template": "t",
            "program": "p",
            "adapter": "chat",
            "runtime": "url",
        },
        "threshold": THRESHOLD if certified else None,
        "certified": certified,
        "keep": 0.95,
        "confidence": 0.95,
        "predictors": [],
        "sampling": {"temperature": 0.0, "max_tokens": 64, "context": 512},
        "model": {
            "features": ["a"],
            "mean": [0.0],
            "scale": [1.0],
            "weights": [1.0],
            "bias": 0.0,
            "calibration": {"kind": "sigmoid", "a": 1.0, "b": 0.0},
        },
    }


def _manifest(task: str, version: str, router: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": task,
        "version": version,
        "base": {"name": "unsloth/Llama-3.2-1B-Instruct", "sha256": "0" * 64},
        "method": "lora",
        "data": {"train": 600, "calibrate": 400, "test": 350, "sha256": "0" * 64},
        "teacher": {"model": "openai/gpt-4o", "stand_in": True},
        "model": {"file": "model.gguf", "sha256": DIGEST, "quantization": "q8_0", "ollama": None},
        "parity": {"prompt_tokens_equal": True, "answers_equal": 0.99, "metric_delta": 0.0},
        "scores": SCORES,
        "router": {
            "threshold": router["threshold"],
            "certified": router["certified"],
            "keep": 0.95,
            "confidence": 0.95,
            "local_share": 0.803 if router["certified"] else 0.0,
        },
        "latency_ms": {"teacher": {"p50": 640, "p95": 1290}, "local": {"p50": 50, "p95": 62}},
        "cost_per_1k_usd": {"teacher": 1.38, "hybrid": 0.272},
        "software": {},
        "seed": 0,
    }
