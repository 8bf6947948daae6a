"""No key leaves with a bundle: what is to be carried is searched for the keys of this machine and for the shapes of keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

NAMES = ("_API_KEY", "_API_KEYS", "_TOKEN", "_SECRET", "_ACCESS_KEY")
SHAPES = re.compile(
    rb"(-----BEGIN) [A-Z ]*PRIVATE KEY-----"
    rb"|\b(sk-)[A-Za-z0-9_-]{24,}"
    rb"|\b(hf_)[A-Za-z0-9]{30,}"
    rb"|\b(AKIA)[0-9A-Z]{16}\b"
    rb"|\b(gsk_|xai-|gh[pousr]_)[A-Za-z0-9]{20,}"
    rb"|\b(github_pat_)\w{20,}"
    rb"|\b(glpat-)[\w-]{16,}"
    rb"|\b(AIza)[\w-]{30,}"
    rb"|\b(xox[abeoprs]-)[\w-]{10,}"
    rb"|\b(hs-)[\w-]{40,}"  # ours
)
"""Those of serve/guard that a key alone has: a web token or a link with a password may stand in a task."""
WEIGHTS = (".gguf", ".safetensors")
"""Numbers, in which anything that short occurs by chance."""
SHORTEST = 8
"""Characters; a shorter value of a variable may be a word that is anywhere."""
LARGEST = 64_000_000
"""Bytes; only weights and data are larger, and data is searched while it is exported."""


class Secrets:
    """The keys in an environment: values of variables that end as keys do, and of the files that `…_FILE` names."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._known: dict[bytes, str] = {}
        for name, value in environment.items():
            if name.endswith(NAMES):
                for key in value.split(","):
                    self._know(name, key)
            elif name.endswith("_FILE") and name.removesuffix("_FILE").endswith((*NAMES, "_KEY")):
                file = Path(value)
                if file.is_file():
                    self._know(name, file.read_text(encoding="utf-8", errors="replace"))

    def _know(self, name: str, key: str) -> None:
        if len(key.strip()) >= SHORTEST:
            self._known[key.strip().encode()] = name

    def in_data(self, data: bytes, *, shapes: bool = True) -> str | None:
        """What secret the data holds, without showing it; None where there is none."""
        for key, name in self._known.items():
            if key in data:
                return f"the value of {name}"
        found = SHAPES.search(data) if shapes else None
        return f"what looks like a key ({b''.join(found.groups(b'')).decode()}…)" if found else None

    def in_file(self, file: Path) -> str | None:
        if file.stat().st_size > LARGEST:
            return None
        return self.in_data(file.read_bytes(), shapes=file.suffix not in WEIGHTS)
