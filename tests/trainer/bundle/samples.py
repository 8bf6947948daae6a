"""Small bundles for the tests, with a key made once a session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.bundle import keys
from trainer.bundle.contents import BUNDLE, Contents
from trainer.bundle.write import Source, write

CREATED = "20261121T073000Z"
VERSION = "20261120T221500Z-1a2b3c4d"
FILES = {
    f"releases/words/{VERSION}/manifest.json": b'{"task": "words"}\n',
    f"releases/words/{VERSION}/model.gguf": bytes(range(256)) * 20,
    "tasks/words/task.yaml": b"name: words\n",
    "tasks/words/data/rows.jsonl": b'{"text": "one"}\n' * 30,
    "bases/models--org--small/0123abcd/config.json": b"{}\n",
    "legal/NOTICE.txt": b"",
}


def write_bundle(
    folder: Path,
    key: Path,
    files: Mapping[str, bytes] = FILES,
    *,
    part_bytes: int = 1000,
    created: str = CREATED,
    kind: str = BUNDLE,
    **options: Any,
) -> Contents:
    """Write a bundle of `files`, whose current release is VERSION, signed with `key`."""
    return write(
        folder,
        [Source.data(path, data) for path, data in files.items()],
        kind=kind,
        created=created,
        homestill="0.0.0",
        about={"current": {"words": VERSION}},
        seal=lambda where, data: keys.sign(where, key, data),
        part_bytes=part_bytes,
        **options,
    )
