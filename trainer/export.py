"""Export: the student and its base as GGUF, made and quantised by the pinned llama.cpp.

The converter is the one of llama-cpp-python's own source, which `scripts/install` unpacks: converter,
quantiser and runtime are one version, and nothing is fetched at run time. What serving relies on is
asserted on the finished file. The base is converted once for all tasks and kept in the cache. With
`student.deliver: adapter` the student is that same base and an adapter of a few megabytes beside it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import child
from trainer.conversion import adapter as adapters
from trainer.errors import ExportError
from trainer.gguf_files import PACKAGES, Maker, cached_base
from trainer.progress import progress
from trainer.runs import Run, sha256_file, write_json
from trainer.settings import StudentSettings
from trainer.template import Template
from trainer.training import base as bases

SCRIPT = "convert_hf_to_gguf.py"


def inputs(run: Run) -> dict[str, Any]:
    """What the GGUF files depend on."""
    student = run.task.settings.student
    trained = {"model": bases.sha256(run.folder / "train" / "model")}
    if student.deliver == "adapter":
        trained["adapter"] = bases.sha256(run.folder / "train" / "adapter")
    return {
        **trained,
        "base": bases.sha256(bases.resolve(run)),
        "quantize": student.quantize,
        "versions": bases.versions(*PACKAGES),
    }


def run(run: Run) -> None:
    """Write export/base.gguf, export/summary.json, and export/model.gguf or export/adapter.gguf.

    Raises:
        ExportError: the converter is missing or fails, a file lacks something that serving needs, or
            the adapter can only be served merged.
        DiskError: the files would not fit.
    """
    from transformers import AutoTokenizer

    folder, student = run.stage("export"), run.task.settings.student
    model, base = run.folder / "train" / "model", bases.resolve(run)
    apart = student.deliver == "adapter"
    template = Template.freeze(AutoTokenizer.from_pretrained(model, local_files_only=True))
    plain = _template_of_base(base, student, template)
    llama_cpp = converter(run.environment, SCRIPT, *([adapters.SCRIPT] if apart else []))
    if apart:
        _check_adapter(run.folder / "train" / "adapter")
    cached = cached_base(run.home.cache, base, student.quantize, plain)
    made = 0 if apart and cached.exists() else 4 * bases.weight_bytes(base)
    run.need_disk(made + 50_000_000, "export")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with progress("exporting", 3 if apart else 4) as advance:
        maker = Maker(
            llama_cpp=llama_cpp,
            kind=student.quantize,
            work=work,
            environment=child.environment(run.environment),
            advance=advance,
        )
        maker.make_base(base, folder / "base.gguf", plain, cached)
        if apart:
            maker.make_adapter(run.folder / "train" / "adapter", base, folder)
        else:
            maker.make(model, folder / "model.gguf", template)
    _summarise(folder, student, template, plain)
    shutil.rmtree(work)


def _template_of_base(base: Path, student: StudentSettings, template: Template) -> Template:
    """The base's own template: a soft prompt stands in the student's, in tokens that the base does not have."""
    from transformers import AutoTokenizer

    if student.method != "prompt":
        return template
    return Template.freeze(AutoTokenizer.from_pretrained(base, local_files_only=True))


def _summarise(folder: Path, student: StudentSettings, template: Template, plain: Template) -> None:
    """What was made. `model` is the file that is the task's own; an adapter's `base` is the one beside it."""
    names = {"model": "adapter.gguf" if student.deliver == "adapter" else "model.gguf", "base": "base.gguf"}
    files = {
        key: {
            "sha256": sha256_file(folder / name),
            "bytes": (folder / name).stat().st_size,
            "quantization": student.quantize,
        }
        for key, name in names.items()
    }
    templates = {"template": template.to_json(), "base_template": plain.to_json()}
    write_json(folder / "summary.json", {**files, **templates, "deliver": student.deliver})


def _check_adapter(adapter: Path) -> None:
    if not (adapter / adapters.CONFIG).is_file():
        raise ExportError(
            f"{adapter} holds no adapter to deliver; use student.method lora or qlora, "
            "or set student.deliver to merged"
        )
    found = adapters.unservable(adapter)
    if found:
        raise ExportError(
            f"the adapter cannot be served beside its base: {'; '.join(found)}; set student.deliver to merged"
        )


def converter(environment: Mapping[str, str], *scripts: str) -> Path:
    """The folder of llama.cpp's converter.

    Args:
        scripts: what it has to hold; by default the converter of whole models.

    Raises:
        ExportError: it is not there.
    """
    installed = Path(sys.prefix) / "share" / "homestill" / "llama.cpp"
    folder = Path(environment.get("HOMESTILL_LLAMA_CPP") or installed)
    missing = [name for name in scripts or (SCRIPT,) if not (folder / name).is_file()]
    if missing:
        raise ExportError(
            f"{folder} holds no {' and no '.join(missing)}, which export needs; run scripts/install, "
            "or set HOMESTILL_LLAMA_CPP to the folder that holds it"
        )
    return folder
