"""Export: the student and its base as GGUF, made and quantised by the pinned llama.cpp.

The converter is the one of llama-cpp-python's own source, which `scripts/install` unpacks: converter,
quantiser and runtime are one version, and nothing is fetched at run time. What serving relies on is
asserted on the finished file. The base is converted once for all tasks and kept in the cache.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import child, process
from trainer.conversion.check import faults
from trainer.errors import ExportError
from trainer.progress import Advance, progress
from trainer.runs import Run, sha256_file, sha256_json, write_json
from trainer.template import Template
from trainer.training import base as bases

SCRIPT = "convert_hf_to_gguf.py"
PACKAGES = ("llama-cpp-python", "gguf", "transformers")


def inputs(run: Run) -> dict[str, Any]:
    """What the GGUF files depend on."""
    return {
        "model": bases.sha256(run.folder / "train" / "model"),
        "base": bases.sha256(bases.resolve(run)),
        "quantize": run.task.settings.student.quantize,
        "versions": bases.versions(*PACKAGES),
    }


def run(run: Run) -> None:
    """Write export/model.gguf, export/base.gguf and export/summary.json.

    Raises:
        ExportError: the converter is missing or fails, or a file lacks something that serving needs.
        DiskError: the files would not fit.
    """
    from transformers import AutoTokenizer

    folder, kind = run.stage("export"), run.task.settings.student.quantize
    model, base = run.folder / "train" / "model", bases.resolve(run)
    template = Template.freeze(AutoTokenizer.from_pretrained(model, local_files_only=True))
    llama_cpp = converter(run.environment)
    run.need_disk(4 * bases.weight_bytes(base) + 50_000_000, "export")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with progress("exporting", 4) as advance:
        maker = _Maker(
            llama_cpp=llama_cpp,
            kind=kind,
            template=template,
            work=work,
            environment=child.environment(run.environment),
            advance=advance,
        )
        cached = run.home.cache / "base-gguf" / f"{_base_key(base, kind, template)}.gguf"
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            maker.make(_staged(base, work / "base", template), cached)
        _link(cached, folder / "base.gguf")
        maker.make(model, folder / "model.gguf")
    files = {
        name: {"sha256": sha256_file(file), "bytes": file.stat().st_size, "quantization": kind}
        for name, file in (("model", folder / "model.gguf"), ("base", folder / "base.gguf"))
    }
    write_json(folder / "summary.json", {**files, "template": template.to_json()})
    shutil.rmtree(work)


def converter(environment: Mapping[str, str]) -> Path:
    """The folder of llama.cpp's converter.

    Raises:
        ExportError: it is not there.
    """
    installed = Path(sys.prefix) / "share" / "homestill" / "llama.cpp"
    folder = Path(environment.get("HOMESTILL_LLAMA_CPP") or installed)
    if not (folder / SCRIPT).is_file():
        raise ExportError(
            f"{folder} holds no {SCRIPT}, which export needs; run scripts/install, "
            "or set HOMESTILL_LLAMA_CPP to the folder that holds it"
        )
    return folder


class _Maker:
    """Converts to f16, quantises, checks, and puts the file in place in one step."""

    def __init__(
        self,
        *,
        llama_cpp: Path,
        kind: str,
        template: Template,
        work: Path,
        environment: dict[str, str],
        advance: Advance,
    ) -> None:
        self._llama_cpp = llama_cpp
        self._kind = kind
        self._template = template
        self._work = work
        self._environment = environment
        self._advance = advance

    def make(self, model: Path, out: Path) -> None:
        """Make `out` from a folder in the Hugging Face layout.

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
        found = faults(made, model, self._template)
        if found:
            raise ExportError(
                f"the GGUF made of {model} cannot be served: {'; '.join(found)}; use another base"
            )
        self._advance(1, f"quantised to {self._kind}")
        os.replace(made, out)

    def _run(self, module: str, *args: str | Path, timeout: float) -> None:
        log = self._work.parent / "export.log"
        words = process.module(module, *args)
        code = child.run(words, folder=self._work, log=log, environment=self._environment, timeout=timeout)
        if code:
            raise ExportError(
                f"{module} ended with code {code}: {child.last_line(log)}; the log is {log}; "
                "check that llama.cpp supports the base's architecture and tokenizer"
            )


def _base_key(base: Path, kind: str, template: Template) -> str:
    return sha256_json([bases.sha256(base), kind, template.sha256, bases.versions(*PACKAGES)])[:16]


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
