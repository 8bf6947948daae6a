"""What the double keeps: blobs on disk, models by name, and the faults that are switched on."""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tests.contract.go_template import TemplateError, parse

DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
CHATML = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
)
DEFAULTS = ["registry.ollama.ai", "library"]
UNQUANTIZED = {0: "F32", 1: "F16", 32: "BF16"}
SHORT_TEMPLATE = 400
"""Jinja shorter than this is taken for chatml: Ollama's distance to its known templates is then small."""

FAULTS = {
    "wrong_digest": "an upload ends as digest mismatch",
    "cut_upload": "the connection dies in the middle of an upload",
    "restart_upload": "the server restarts in the middle of an upload and forgets it; the next request is refused too",
    "create_error": "create answers 500 from llama-quantize",
    "blob_vanishes": "the blob is gone between HEAD and create",
    "slow_create": "create answers only when its client has gone, and is finished all the same",
    "restart_create": "the server restarts during create and forgets it; the next request is refused too",
    "bad_parameters": "a parameter is stored with a type that breaks inference",
    "misdetected_template": "the given template is ignored for chatml",
    "busy": "inference answers 503",
    "token_repeat": "inference is given up: done:false, finish_reason null",
    "drop": "the connection is closed without an answer",
}


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Faults:
    """How often each fault still happens; a negative number means always."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()

    def set(self, wanted: dict[str, int]) -> None:
        unknown = sorted(set(wanted) - set(FAULTS))
        if unknown:
            raise Refused(400, f"unknown fault {', '.join(unknown)}; known are {', '.join(FAULTS)}")
        with self._lock:
            self._left.update(wanted)

    def strikes(self, fault: str) -> bool:
        with self._lock:
            left = self._left.get(fault, 0)
            if left > 0:
                self._left[fault] = left - 1
            return left != 0

    @property
    def left(self) -> dict[str, int]:
        return {fault: count for fault, count in self._left.items() if count}


def canonical(name: str) -> str:
    """`host/namespace/model:tag`, shortened by the defaults as Ollama shows it.

    Raises:
        Refused: 400, the name is invalid.
    """
    path, _, tag = name.rpartition(":") if ":" in name.rsplit("/", 1)[-1] else (name, "", "latest")
    parts = path.split("/")
    if len(parts) > len(DEFAULTS) + 1:
        raise Refused(400, "invalid model name")
    host, namespace, model = [*DEFAULTS[: 3 - len(parts)], *parts]
    checks = ((HOST, host), (NAMESPACE, namespace), (NAME_PART, model), (NAME_PART, tag))
    if not all(pattern.fullmatch(part) for pattern, part in checks):
        raise Refused(400, "invalid model name")
    if host == DEFAULTS[0]:
        return f"{model}:{tag}" if namespace == DEFAULTS[1] else f"{namespace}/{model}:{tag}"
    return f"{host}/{namespace}/{model}:{tag}"


class Blobs:
    """Files named by digest. Existence is all that HEAD tests; nothing is hashed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        return self.folder / digest.replace(":", "-")

    def receive(self, digest: str, chunks: Iterator[bytes]) -> None:
        """Store under the true digest, whatever was announced.

        Raises:
            Refused: 400, the announced digest is another; the bytes stay as an orphan.
        """
        partial = self.folder / f"sha256-{uuid.uuid4().hex[:10]}"
        hasher = hashlib.sha256()
        try:
            with open(partial, "wb") as file:
                for chunk in chunks:
                    hasher.update(chunk)
                    file.write(chunk)
            found = f"sha256:{hasher.hexdigest()}"
            partial.replace(self.path(found))
        finally:
            partial.unlink(missing_ok=True)
        if found != digest:
            raise Refused(400, f'digest mismatch, expected "{digest}", got "{found}"')


@dataclass
class Model:
    """A created model."""

    name: str
    gguf: Path
    digest: str
    """Of the layer that create wrote, which need not be what was uploaded."""
    template: str | None
    """Go; None where the GGUF's own Jinja renders."""
    parameters: dict[str, Any]
    jinja: str | None
    details: dict[str, Any]
    adapter: Path | None = None
    """A GGUF LoRA adapter on `gguf`."""
    modified_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())


class Models:
    """Models by name, without regard to case; an existing name is silently replaced."""

    def __init__(self, blobs: Blobs, faults: Faults) -> None:
        self._blobs = blobs
        self._faults = faults
        self._models: dict[str, Model] = {}

    def all(self) -> list[Model]:
        return list(self._models.values())

    def get(self, name: str) -> Model:
        asked = canonical(name)
        asked = f"{asked.removesuffix(':local')}:latest" if asked.endswith(":local") else asked
        found = self._models.get(asked.lower())
        if found is None:
            raise Refused(404, f"model '{asked}' not found")
        return found

    def adapter_of(self, name: str) -> Path | None:
        """The adapter of a model that may be gone by now."""
        found = self._models.get(name.lower())
        return found.adapter if found else None

    def delete(self, name: str) -> None:
        gone = self._models.pop(self.get(name).name.lower())
        self._collect(gone)

    def copy(self, source: str, destination: str) -> None:
        old = self.get(source)
        name = canonical(destination)
        self._models[name.lower()] = Model(**{**vars(old), "name": name})

    def check(self, body: dict[str, Any]) -> None:
        """What create refuses before it starts: 400."""
        canonical(str(body.get("model") or body.get("name") or ""))
        files = body.get("files")
        if body.get("from"):
            return
        if files is None:
            raise Refused(400, "neither 'from' or 'files' was specified")
        for path in [*files, *(body.get("adapters") or {})]:
            if path.startswith("/") or ".." in PurePosixPath(path).parts:
                raise Refused(400, "file path must be relative")

    def create(self, body: dict[str, Any]) -> Iterator[str]:
        """The statuses of a create, in order; the model is there with the last, `success`.

        Raises:
            Refused: with the code that `stream: false` shows.
        """
        given = canonical(str(body.get("model") or body.get("name")))
        name = self._models[given.lower()].name if given.lower() in self._models else given
        if body.get("from"):
            yield from self._derive(name, body)
            return
        if self._faults.strikes("blob_vanishes"):
            for digest in body["files"].values():
                self._blobs.path(digest).unlink(missing_ok=True)
        gguf = self._gguf(body["files"])
        adapter = self._adapter(body.get("adapters") or {})
        yield "parsing GGUF"
        info = read_gguf(gguf)
        if self._faults.strikes("create_error"):
            raise Refused(
                500,
                "failed to validate GGUF with llama-quantize without compatibility patches: "
                "llama-quantize failed: exit status 1",
            )
        yield "verifying conversion"
        layer = self._rewritten(gguf, info)
        digest = layer.name.replace("-", ":")
        yield f"creating new layer {digest}"
        template, stops = self._template(body, info)
        if stops:
            yield "using autodetected template chatml"
        stored = {**stops, **(body.get("parameters") or {})}
        if self._faults.strikes("bad_parameters"):
            stored["stop"] = "</s>"
        yield "writing manifest"
        details = {"format": "gguf", "family": info["family"], "quantization_level": info["quantization"]}
        replaced = self._models.get(name.lower())
        made = Model(name, layer, digest, template, stored, info["jinja"], details, adapter)
        self._models[name.lower()] = made
        if replaced:
            self._collect(replaced)
        yield "success"

    def _collect(self, gone: Model) -> None:
        """A layer goes with the last model that uses it."""
        used = {file for model in self._models.values() for file in (model.gguf, model.adapter)}
        for file in filter(None, {gone.gguf, gone.adapter} - used):
            file.unlink(missing_ok=True)

    def _derive(self, name: str, body: dict[str, Any]) -> Iterator[str]:
        try:
            base = self.get(str(body["from"]))
        except Refused:
            raise Refused(500, "pull model manifest: file does not exist") from None
        yield f"using existing layer {base.digest}"
        changed = {
            "name": name,
            "template": body.get("template") or base.template,
            "parameters": {**base.parameters, **(body.get("parameters") or {})},
        }
        yield "writing manifest"
        self._models[name.lower()] = Model(**{**vars(base), **changed})
        yield "success"

    def _gguf(self, files: dict[str, str]) -> Path:
        if not files:
            raise Refused(400, "unknown type")
        ((file, digest),) = files.items()
        if not DIGEST.fullmatch(digest):
            raise Refused(500, "invalid digest format")
        blob = self._blobs.path(digest)
        if not blob.exists():
            if not file.endswith((".gguf", ".safetensors")):
                raise Refused(400, "unknown type")
            raise Refused(500, f"open {blob}: no such file or directory")
        with open(blob, "rb") as opened:
            if opened.read(4) != b"GGUF":
                known = file.endswith((".gguf", ".safetensors"))
                raise Refused(400, "supplied file was not in GGUF format" if known else "unknown type")
        return blob

    def _adapter(self, files: dict[str, str]) -> Path | None:
        """The one adapter of a create; every fault of it is a 400."""
        if len(files) > 1:
            raise Refused(400, "only one adapter is currently supported")
        if not files:
            return None
        try:
            return self._gguf(files)
        except Refused as refusal:
            raise Refused(400, str(refusal)) from refusal

    def _rewritten(self, gguf: Path, info: dict[str, Any]) -> Path:
        """llama-quantize COPY leaves what it wrote before bit-identical, and changes what a converter wrote."""
        if info["quantization"] not in UNQUANTIZED.values():
            return gguf
        content = gguf.read_bytes() + bytes(32)
        layer = self._blobs.path(f"sha256:{hashlib.sha256(content).hexdigest()}")
        layer.write_bytes(content)
        return layer

    def _template(self, body: dict[str, Any], info: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        given = body.get("template")
        if given and not self._faults.strikes("misdetected_template"):
            try:
                parse(given)
            except TemplateError as error:
                raise Refused(400, f"template error: {error}") from error
            return given, {}
        if given or (info["jinja"] and len(info["jinja"]) < SHORT_TEMPLATE):
            return CHATML, {"stop": ["<|im_start|>", "<|im_end|>"]}
        return None, {}


def read_gguf(path: Path) -> dict[str, Any]:
    """Family, quantization and chat template of a GGUF.

    Raises:
        Refused: 500, the file is cut short.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    except (ValueError, IndexError) as error:
        raise Refused(500, f"tensor offset+size exceeds file size ({path.stat().st_size})") from error
    if end > path.stat().st_size:
        raise Refused(500, f"tensor offset+size ({end}) exceeds file size ({path.stat().st_size})")
    values = {key: f.contents() for key, f in reader.fields.items() if "tokenizer.ggml" not in key}
    kind = values.get("general.file_type", 0)
    return {
        "family": values.get("general.architecture", "llama"),
        "quantization": UNQUANTIZED.get(kind, f"type {kind}"),
        "jinja": values.get("tokenizer.chat_template"),
    }


def read_exactly(source: BinaryIO, length: int) -> Iterator[bytes]:
    """`length` bytes in pieces.

    Raises:
        Refused: 500, the other side stopped early.
    """
    while length:
        chunk = source.read(min(length, 1 << 16))
        if not chunk:
            raise Refused(500, "unexpected EOF")
        length -= len(chunk)
        yield chunk
