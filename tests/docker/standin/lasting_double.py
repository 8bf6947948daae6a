"""The double of Ollama as a container: it answers with llama.cpp, and like Ollama it keeps its models on disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.contract.ollama_double import OllamaDouble
from tests.contract.ollama_engine import Llama
from tests.contract.ollama_state import Model, Models


class Lasting(Models):
    """Models whose manifests are written to a file at every change, before anybody hears of it."""

    def keep_in(self, file: Path) -> None:
        self._file = file
        stored = json.loads(file.read_text("utf-8")) if file.is_file() else []
        self._models = {each["name"].lower(): Model(**each | {"gguf": Path(each["gguf"])}) for each in stored}

    def write(self) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps([vars(m) | {"gguf": str(m.gguf)} for m in self.all()]), "utf-8")
        partial.replace(self._file)

    def create(self, body):  # type: ignore[no-untyped-def]
        for status in super().create(body):
            if status == "success":
                self.write()
            yield status

    def delete(self, name: str) -> None:
        super().delete(name)
        self.write()

    def copy(self, source: str, destination: str) -> None:
        super().copy(source, destination)
        self.write()


def main() -> None:
    folder = Path(os.environ["OLLAMA_MODELS"])
    host, _, port = os.environ["OLLAMA_HOST"].partition(":")
    double = OllamaDouble(folder / "blobs", Llama(), host, int(port))
    models = Lasting(double.blobs, double.faults)
    models.keep_in(folder / "manifests.json")
    double.models = models
    sys.stdout.write(f"a double of Ollama on {double.url}\n")
    sys.stdout.flush()
    double.server.serve_forever()


if __name__ == "__main__":
    main()
