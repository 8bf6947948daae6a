"""Releases on disk whose hashes are right, of a task with one enum field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from serve.fingerprint import fingerprint
from serve.release import content_hash

SYSTEM = {"role": "system", "content": "Sort the ticket."}
PREFIX, SUFFIX = "[[ ## text ## ]]\n", "\n\nAnswer with the label."
THRESHOLD = 0.8


def write_release(
    releases: Path,
    *,
    stamp: str = "20261120T221500Z",
    runtime: str = "url",
    task: str = "tickets",
    router: dict[str, Any] | None = None,
    task_yaml: str = "name: tickets\nteacher:\n  price_per_1m: {input: 2.0, output: 10.0}\n",
    current: bool = True,
    gguf: bytes = b"not a model, but its hash is right",
    lora: bytes | None = None,
) -> str:
    """Write a release whose confidence is about the probability of the label's tokens; its version.

    Args:
        gguf: the model, or where there is `lora` the base that this is put on.
    """
    models = {"model.gguf": gguf} if lora is None else {"adapter.gguf": lora, "base.gguf": gguf}
    digest, *base = [hashlib.sha256(data).hexdigest() for data in models.values()]
    routed = _router(digest, runtime, task) | (router or {})
    if base:
        routed["binds"]["base"] = base[0]
    contents = {
        **models,
        "task.yaml": task_yaml.encode(),
        "router.json": json.dumps(routed).encode(),
    }
    files = {name: f"sha256:{hashlib.sha256(data).hexdigest()}" for name, data in contents.items()}
    version = f"{stamp}-{content_hash(files)}"
    folder = releases / task / version
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    manifest = _manifest(task, version, digest, files, router or {})
    if base:
        manifest["model"] |= {"file": "adapter.gguf", "base": "base.gguf"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if current:
        point(releases, version, task)
    return version


def point(releases: Path, version: str, task: str = "tickets") -> None:
    """Make a version the current one, as release and rollback do: in one step."""
    partial = releases / task / ".current.partial"
    partial.write_text(f"{version}\n")
    partial.replace(releases / task / "current")


def _router(digest: str, runtime: str, task: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "task": task,
        "binds": {
            "model": digest,
            "quantization": "q8_0",
            "template": "t",
            "program": "p",
            "adapter": "chat",
            "runtime": runtime,
        },
        "threshold": THRESHOLD,
        "certified": True,
        "keep": 0.95,
        "confidence": 0.9,
        "predictors": [
            {
                "name": "predict",
                "fingerprint": fingerprint([SYSTEM, {"role": "user", "content": ""}]),
                "prefix": PREFIX,
                "suffix": SUFFIX,
                "fields": [{"name": "label", "labels": ["billing", "other"]}],
            }
        ],
        "sampling": {"temperature": 0.0, "max_tokens": 64, "context": 512},
        "model": {
            "features": ["label.min"],
            "mean": [0.0],
            "scale": [1.0],
            "weights": [1.0],
            "bias": 0.0,
            "calibration": {"kind": "sigmoid", "a": 1.0, "b": 0.0},
        },
    }


def _manifest(
    task: str, version: str, digest: str, files: dict[str, str], router: dict[str, Any]
) -> dict[str, Any]:
    router = _router(digest, "", task) | router
    return {
        "schema": 1,
        "task": task,
        "version": version,
        "base": {"name": "base", "sha256": "0" * 64},
        "method": "lora",
        "data": {"train": 1, "calibrate": 1, "test": 1, "sha256": "0" * 64},
        "teacher": {"model": "openai/gpt-4o", "stand_in": True},
        "model": {
            "file": "model.gguf",
            "sha256": digest,
            "quantization": "q8_0",
            "ollama": f"{task}:{version[-8:]}",
        },
        "parity": {"prompt_tokens_equal": True},
        "scores": {},
        "router": {
            "threshold": router["threshold"],
            "certified": router["certified"],
            "keep": 0.95,
            "confidence": 0.9,
            "local_share": 0.8,
        },
        "latency_ms": {},
        "cost_per_1k_usd": {},
        "software": {},
        "seed": 0,
        "files": files,
    }
