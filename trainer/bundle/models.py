"""A carried release's model on a host where Ollama serves: registered there as it was where it was certified.

A release holds weights, not how Ollama was told to treat them; the run that made it does. So a bundle says
that beside, and what it says is held against the hash that the release's certificate binds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve import release as releases
from serve.release import Release, ReleaseInvalid
from trainer.errors import RegisterError
from trainer.runs import Home, read_json, sha256_json
from trainer.runtimes.local import Adapter, LocalModel, Runtime
from trainer.template import Template

BASE, ADAPTER = "base.gguf", "adapter.gguf"
"""Files of a release whose student is an adapter."""


def facts(home: Home, task: str, version: str) -> dict[str, Any] | None:
    """What registering a release needs beside it, its frozen template; None where its run is gone."""
    for run in sorted(home.runs(task).glob("*/release/summary.json")):
        if read_json(run).get("version") == version:
            return {"template": read_json(run.parents[1] / "export" / "summary.json")["template"]}
    return None


def register(home: Home, task: str, version: str, told: Mapping[str, Any] | None, runtime: Runtime) -> str:
    """Make a release's model servable; what to tell a person.

    Args:
        told: what `facts` gave on the host that the release comes from.

    Raises:
        RegisterError: it is not the model that was certified, or the runtime refuses it.
        RuntimeUnavailable: the runtime cannot be reached.
    """
    try:
        release = releases.load(home.releases(task) / version)
    except ReleaseInvalid as error:
        raise RegisterError(str(error)) from error
    certified_on = release.router.binds.runtime
    if certified_on != runtime.kind:
        return f"{task}: certified with {certified_on}, {runtime.kind} serves here; train it again, its traces are here"
    if told is None:
        return (
            f"{task}: the bundle does not say how to register its model; train it again, its traces are here"
        )
    model = _model(release, told)
    return f"{task}: {runtime.register(model).name} is registered"


def _model(release: Release, told: Mapping[str, Any]) -> LocalModel:
    bound = release.router.binds.template
    if sha256_json(told["template"]) != bound:
        raise RegisterError(
            f"{release.folder}: its certificate binds another template than the bundle names; train again"
        )
    manifest, folder = release.manifest, release.folder
    apart = ADAPTER in manifest.files
    weights = BASE if apart else manifest.model.file
    model = LocalModel.of(
        manifest.task,
        "",
        gguf=folder / weights,
        sha256=_sha256(release, weights),
        template=Template.from_json(told["template"]),
        context=release.router.sampling.context,
        max_tokens=release.router.sampling.max_tokens,
        adapter=Adapter(folder / ADAPTER, _sha256(release, ADAPTER)) if apart else None,
    )
    if manifest.model.ollama not in (None, model.name):
        raise RegisterError(
            f"{folder} was served as {manifest.model.ollama}, this would be {model.name}; train again"
        )
    return model


def _sha256(release: Release, name: str) -> str:
    return release.manifest.files[name].removeprefix("sha256:")
