"""The base model's folder: found or downloaded, identified, and completed with the frozen template."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.conversion import families, t5
from trainer.errors import TrainError
from trainer.runs import Run, read_json, sha256_file
from trainer.seam import offline
from trainer.task import Task
from trainer.template import Template

WEIGHTS = "*.safetensors"
FILES = [WEIGHTS, "*.json", "*.jinja", "tokenizer.model", t5.SENTENCE_PIECE]
TWICE = "consolidated*"
"""Some publishers put the weights into the repository a second time, in their own layout."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    t5.SENTENCE_PIECE,
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def resolve(run: Run) -> Path:
    """The folder of the run's base model; a hub name is looked up in the cache and downloaded if needed.

    An encoder-decoder's is one that `conversion.t5` made of it, which holds a conversation.

    Raises:
        TrainError: unknown, unreachable, or without configuration and safetensors weights.
        DiskError: the download does not fit.
    """
    name = run.task.base_path()
    folder = Path(name)
    return _usable(run.task, folder if folder.is_dir() else _from_hub(run, name), run.home.cache)


def at_hand(task: Task, cache: Path) -> Path | None:
    """The folder of a task's base, no network asked: None where it is a hub's model that has not been fetched whole.

    Args:
        cache: of the home.

    Raises:
        TrainError: without configuration and safetensors weights.
    """
    from huggingface_hub import snapshot_download

    folder = Path(task.base_path())
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(folder), local_files_only=True))
        except (OSError, ValueError):  # the hub's errors derive from these
            return None
        if _missing(folder):
            return None
    return _usable(task, folder, cache)


def _usable(task: Task, folder: Path, cache: Path) -> Path:
    """The folder, or what stands in for it, after a look at what every base holds."""
    for pattern in _missing(folder):
        raise TrainError(
            f"student.base is {task.settings.student.base!r}, whose folder {folder} holds no {pattern}; "
            "give a folder or hub name with a model in the Hugging Face layout, in safetensors"
        )
    return t5.ready(folder, cache) if model_type(folder) in families.ENCODER_DECODERS else folder


def _missing(folder: Path) -> list[str]:
    return [pattern for pattern in ("config.json", WEIGHTS) if not any(folder.glob(pattern))]


def model_type(folder: Path) -> str:
    """transformers' name of a model's architecture."""
    return str(read_json(folder / "config.json").get("model_type"))


def sha256(folder: Path) -> str:
    """Identity of a model: the hash over the names and contents of its configuration, tokenizer and weights."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    return hashlib.sha256(
        "".join(f"{file.name}:{sha256_file(file)}\n" for file in files).encode()
    ).hexdigest()


def weight_bytes(folder: Path) -> int:
    """Size of the weights on the disk."""
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS))


def versions(*packages: str) -> dict[str, str]:
    """Versions of Homestill and of the packages that a stage's outcome depends on."""
    return {package: version(package) for package in ("homestill", *packages)}


def hubs_off(environment: Mapping[str, str]) -> bool:
    """Whether hubs are switched off, by our switch or by those of Hugging Face's libraries, in their words."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    theirs = any(environment.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)
    return offline(environment) or theirs


def complete(folder: Path, base: Path, template: Template, tokenizer: Path | None = None) -> None:
    """Put the base's tokenizer, the frozen template and the older configuration keys into a model's folder.

    Args:
        tokenizer: a folder whose tokenizer files replace the base's, where tokens were added.

    transformers 5 writes rope_parameters and dtype; what reads only transformers 4's keys (Ollama's own
    importer, older servers) finds rope_theta, rope_scaling and torch_dtype beside them.
    """
    for name in TOKENIZER_FILES:
        for source in (base, tokenizer or base):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
    _edit(folder / "tokenizer_config.json", {"chat_template": template.jinja}, _portable_class)
    _edit(folder / "config.json", {}, _legacy_keys)
    for file in folder.iterdir():
        if not file.is_symlink():
            file.chmod(0o644)  # safetensors writes 0600, which a server of another user could not read


def _wanted(file: Path) -> bool:
    return any(file.match(each) for each in FILES) and not file.match(TWICE)


def _from_hub(run: Run, name: str) -> Path:
    import httpx
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    cached = hubs_off(run.environment)
    try:
        config = Path(hf_hub_download(name, "config.json", local_files_only=cached))
        families.known(json.loads(config.read_text(encoding="utf-8")), name)  # before gigabytes are fetched
        if not cached:
            run.need_disk(_to_fetch(name), f"downloading {name}", Path(constants.HF_HUB_CACHE), "HF_HOME")
        return Path(
            snapshot_download(name, allow_patterns=FILES, ignore_patterns=TWICE, local_files_only=cached)
        )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's errors derive from these
        where = "in the local cache (hubs are switched off)" if cached else "on the Hugging Face hub"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainError(
            f"student.base is {name!r}, which is neither a folder of the task nor a model {where}: {reason}; "
            "correct the name, set HF_TOKEN if it is gated, or give the folder of a model"
        ) from error


def _to_fetch(name: str) -> int:
    """Bytes of a model's files that the cache lacks; 0 where the hub cannot be asked, so that what was fetched will do."""
    import httpx
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(name, files_metadata=True)
    except httpx.TransportError:
        return 0
    return sum(
        file.size or 0
        for file in info.siblings or []
        if _wanted(Path(file.rfilename))
        and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    )


def _edit(path: Path, values: dict[str, Any], change: Any) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_class(tokenizer: dict[str, Any]) -> None:
    if tokenizer.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4's name of the same class


def _legacy_keys(config: dict[str, Any]) -> None:
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        config["rope_theta"] = rope.pop("rope_theta", 10000.0)
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
