"""Releases and answers as the tests of audits and drift need them."""

from __future__ import annotations

from pathlib import Path

from serve.manifest import AuditBaseline, Manifest, RouterFile
from serve.release import Release

BASELINE = AuditBaseline(fields=["label"], kept=400, disagreed=8, upper=0.04)


def release(baseline: AuditBaseline | None = BASELINE, task: str = "tickets", version: str = "v1") -> Release:
    """With no files: nothing of them is asked for."""
    manifest = Manifest.model_construct(task=task, version=version)
    return Release(Path(), manifest, RouterFile.model_construct(task=task, audit=baseline))


def said(label: str, reasoning: str = "so") -> str:
    """An answer in the chat adapter's form."""
    return f"[[ ## reasoning ## ]]\n{reasoning}\n\n[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
