"""manifest.json from what the stages have written."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from serve.manifest import Manifest
from trainer.runs import Run, read_json, read_jsonl, sha256_file, sha256_json

SPLITS = ("train", "calibrate", "test")
PACKAGES = {
    "homestill": "homestill",
    "dspy": "dspy",
    "torch": "torch",
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "llama_cpp": "llama-cpp-python",
    "scikit_learn": "scikit-learn",
}


def split_file(run: Run, name: str) -> Path:
    """train, calibrate or test as curate wrote it."""
    return run.folder / "curate" / f"{name}.jsonl"


def manifest(run: Run, name: str, files: dict[str, str]) -> Manifest:
    """The manifest of a release.

    Args:
        name: its version.
        files: its files, each with `sha256:<hex>`.
    """
    settings = run.task.settings
    evaluated = read_json(run.stage("evaluate") / "summary.json")
    certified = read_json(run.stage("certify") / "summary.json")
    router = read_json(run.stage("certify") / "router.json")
    hybrid = certified["hybrid"]
    return Manifest.model_validate(
        {
            "task": run.task.name,
            "version": name,
            "base": {
                "name": settings.student.base,
                "sha256": read_json(run.stage("train") / "summary.json")["base_sha256"],
            },
            "method": settings.student.method,
            "predictor": settings.student.predictor,
            "data": _data(run),
            "teacher": {"model": settings.teacher.model, "stand_in": settings.teacher.stand_in},
            "model": _model(run),
            "parity": read_json(run.stage("register") / "parity.json"),
            "scores": {
                **{role: evaluated[role] for role in ("teacher", "base", "student")},
                "hybrid": hybrid,
            },
            "router": {
                **{key: router[key] for key in ("threshold", "certified", "keep", "confidence")},
                "local_share": hybrid["local_share"],
            },
            "latency_ms": {
                "teacher": evaluated["teacher"]["latency_ms"],
                "local": evaluated["student"]["latency_ms"],
            },
            "cost_per_1k_usd": {
                **{role: evaluated[role]["cost_per_1k_usd"] for role in ("teacher", "base", "student")},
                "hybrid": hybrid["cost_per_1k_usd"],
            },
            "software": _software(),
            "seed": settings.seed,
            "files": files,
        }
    )


def _model(run: Run) -> dict[str, Any]:
    summary = read_json(run.stage("export") / "summary.json")
    exported, apart = summary["model"], summary.get("deliver") == "adapter"
    registered = read_json(run.stage("register") / "registration.json")["model"]
    return {
        "file": "adapter.gguf" if apart else "model.gguf",
        "base": "base.gguf" if apart else None,
        "sha256": exported["sha256"],
        "quantization": exported["quantization"],
        "ollama": registered["name"] if registered["runtime"] != "embedded" else None,
    }


def _data(run: Run) -> dict[str, Any]:
    rows = {name: read_jsonl(split_file(run, name)) for name in SPLITS}
    return {
        "train": len({row["example"] for row in rows["train"]}),
        "calibrate": len(rows["calibrate"]),
        "test": len(rows["test"]),
        "sha256": sha256_json([sha256_file(split_file(run, name)) for name in SPLITS]),
    }


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue  # a release made without it, such as one trained elsewhere
    return found
