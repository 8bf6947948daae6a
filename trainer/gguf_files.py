"""Makes GGUF files of models in the Hugging Face layout; a base is made once for all tasks and runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from trainer import child, process
from trainer.conversion import adapter as adapters
from trainer.conversion.check import faults
from trainer.errors import ExportError
from trainer.progress import Advance
from trainer.runs import sha256_json
from trainer.template import Template
from trainer.training import base as bases

PACKAGES = ("llama-cpp-python", "gguf", "transformers")
"""Whose versions decide what a file holds."""


def cached_base(cache: Path, base: Path, kind: str, template: Template) -> Path:
    """Where a base's GGUF of this quantisation and template is kept, whether it is there or not."""
    key = sha256_json([bases.sha256(base), kind, template.sha256, bases.versions(*PACKAGES)])[:16]
    return cache / "base-gguf" / f"{key}.gguf"


class Maker:
    """Converts to f16, quantises, checks, and puts the file in place in one step."""

    def __init__(
        self,
        *,
        llama_cpp: Path,
        kind: str,
        work: Path,
        environment: dict[str, str],
        advance: Advance,
    ) -> None:
        self._llama_cpp = llama_cpp
        self._kind = kind
        self._work = work
        self._environment = environment
        self._advance = advance

    def make(self, model: Path, out: Path, template: Template) -> None:
        """Make `out` from a folder in the Hugging Face layout, whose chat template is to be `template`.

        Raises:
            ExportError: a step failed, or the file lacks something.
        """
        seconds = 600 + bases.weight_bytes(model) / 2_000_000  # a slow disk at 2 MB/s
        half = self._work / "f16.gguf"
        self._run("trainer.conversion.convert", self._llama_cpp, model, half, timeout=seconds)
        self._advance(1, "converted")
        made = half
        if self._kind != "f16":
            made = self._work / f"{self._kind}.gguf"
            self._run("trainer.conversion.quantise", half, made, self._kind, timeout=seconds)
            half.unlink()
        found = faults(made, model, template)
        if found:
            raise ExportError(
                f"the GGUF made of {model} cannot be served: {'; '.join(found)}; use another base"
            )
        self._advance(1, f"quantised to {self._kind}")
        os.replace(made, out)

    def make_base(self, base: Path, out: Path, template: Template, cached: Path) -> None:
        """Put a base's GGUF at `out`: a link to `cached`, which is made first where it is not there.

        Args:
            cached: of `cached_base`.

        Raises:
            ExportError: as `make`.
        """
        if cached.exists():
            self._advance(2, "the base is in the cache")
        else:
            cached.parent.mkdir(parents=True, exist_ok=True)
            self.make(_staged(base, self._work / "base", template), cached, template)
        _link(cached, out)

    def make_adapter(self, adapter: Path, base: Path, folder: Path) -> None:
        """Make `folder`/adapter.gguf of PEFT's adapter, for the base.gguf beside it.

        Raises:
            ExportError: the conversion failed, or the file does not fit the base.
        """
        staged = adapters.stage(adapter, self._work / "adapter")
        out = self._work / "adapter.gguf"
        self._run("trainer.conversion.adapter", self._llama_cpp, base, staged, out, timeout=600)
        found = adapters.faults(out, adapter, folder / "base.gguf")
        if found:
            raise ExportError(
                f"the GGUF made of {adapter} cannot be served: {'; '.join(found)}; set student.deliver to merged"
            )
        self._advance(1, "the adapter converted")
        os.replace(out, folder / "adapter.gguf")

    def _run(self, module: str, *args: str | Path, timeout: float) -> None:
        log = self._work.parent / "export.log"
        words = process.module(module, *args)
        code = child.run(words, folder=self._work, log=log, environment=self._environment, timeout=timeout)
        if code:
            raise ExportError(
                f"{module} ended with code {code}: {child.last_line(log)}; the log is {log}; "
                "check that llama.cpp supports the base's architecture and tokenizer"
            )


def _staged(base: Path, folder: Path, template: Template) -> Path:
    """The base with the frozen template; its weights are linked, not copied."""
    folder.mkdir()
    for pattern in (bases.WEIGHTS, "*.safetensors.index.json"):
        for file in base.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    shutil.copyfile(base / "config.json", folder / "config.json")
    bases.complete(folder, base, template)
    return folder


def _link(source: Path, place: Path) -> None:
    place.unlink(missing_ok=True)
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, place)
