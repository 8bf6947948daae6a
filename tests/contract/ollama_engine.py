"""What answers behind the double: a canned text, or llama.cpp on the GGUF that was uploaded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

REPEATS = 30
"""More equal tokens in a row than this and Ollama gives up."""


@dataclass
class Generated:
    """An answer token by token; `reason` is None where generation was given up."""

    tokens: list[dict[str, Any]]
    """token, logprob, bytes, top_logprobs, as Ollama shows them."""
    reason: str | None
    prompt_tokens: int
    text: str
    """Not the tokens joined: a character may be spread over several of them."""


class Engine(Protocol):
    """Answers a rendered prompt with the options that the server arrived at."""

    def count(self, gguf: Path, prompt: str) -> int: ...

    def complete(
        self, gguf: Path, prompt: str, options: dict[str, Any], top: int, adapter: Path | None = None
    ) -> Generated: ...


@dataclass
class Canned:
    """Answers every prompt from a function; a token is a word with its leading white space."""

    answer: Callable[[str], str] = lambda prompt: "A canned answer."
    asked: list[dict[str, Any]] = field(default_factory=list)

    def count(self, gguf: Path, prompt: str) -> int:
        return len(re.findall(r"\s*\S+", prompt)) + 1

    def complete(
        self, gguf: Path, prompt: str, options: dict[str, Any], top: int, adapter: Path | None = None
    ) -> Generated:
        self.asked.append({"prompt": prompt, "options": options})
        words = re.findall(r"\s*\S+", self.answer(prompt))
        limit = options.get("num_predict", -1)
        kept = words[:limit] if limit > 0 else words
        runs = max((len(list(run)) for _, run in itertools.groupby(kept)), default=0)
        reason = None if runs > REPEATS else "length" if len(kept) < len(words) else "stop"
        tokens = [token(word, -0.1, [(word, -0.1)], top) for word in kept]
        return Generated(tokens, reason, self.count(gguf, prompt), "".join(kept))


class Llama:
    """llama.cpp, in process; a model stays loaded until another is asked. To be closed."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[Path, int, Path | None], Any] | None = None

    def count(self, gguf: Path, prompt: str) -> int:
        return len(self._load(gguf, 4096).tokenize(prompt.encode(), add_bos=True, special=True))

    def complete(
        self, gguf: Path, prompt: str, options: dict[str, Any], top: int, adapter: Path | None = None
    ) -> Generated:
        llama = self._load(gguf, int(options.get("num_ctx", 4096)), adapter)
        llama.reset()
        ids = llama.tokenize(prompt.encode(), add_bos=True, special=True)
        room = llama.n_ctx() - len(ids)
        limit = min(options["num_predict"], room) if options.get("num_predict", -1) > 0 else room
        llama.set_seed(max(int(options.get("seed", 0)), 0))
        sampling = {"temp": options["temperature"], "top_p": options["top_p"], "top_k": options["top_k"]}
        given: list[int] = []
        tokens: list[dict[str, Any]] = []
        for drawn in llama.generate(ids, repeat_penalty=1.0, **sampling):
            text = llama.detokenize(given).decode(errors="replace")
            stop = next((text.index(stop) for stop in options.get("stop", []) if stop in text), None)
            if self._ends(llama, drawn) or stop is not None:
                return Generated(tokens, "stop", len(ids), text[:stop])
            if len(given) >= limit:
                break
            given.append(drawn)
            tokens.append(self._token(llama, drawn, top))
        return Generated(tokens, "length", len(ids), llama.detokenize(given).decode(errors="replace"))

    @staticmethod
    def _ends(llama: Any, drawn: int) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llama.model), drawn))

    @staticmethod
    def _token(llama: Any, drawn: int, top: int) -> dict[str, Any]:
        logprobs = llama.logits_to_logprobs(llama.scores[llama.n_tokens - 1])
        best = [int(other) for other in np.argsort(-logprobs)[:top]]
        named = {other: llama.detokenize([other]).decode(errors="replace") for other in [drawn, *best]}
        return token(named[drawn], logprobs[drawn], [(named[other], logprobs[other]) for other in best], top)

    def close(self) -> None:
        if self._loaded:
            self._loaded[1].close()
            self._loaded = None

    def _load(self, gguf: Path, context: int, adapter: Path | None = None) -> Any:
        import llama_cpp

        if self._loaded is None or self._loaded[0] != (gguf, context, adapter):
            self.close()
            loaded = llama_cpp.Llama(
                str(gguf),
                n_ctx=context,
                n_threads=1,
                logits_all=True,
                lora_path=str(adapter) if adapter else None,
                verbose=False,
            )
            self._loaded = ((gguf, context, adapter), loaded)
        return self._loaded[1]


def token(text: str, logprob: float, others: list[tuple[str, float]], top: int) -> dict[str, Any]:
    """One entry of `logprobs`, `top` alternatives with it."""
    entry = {"token": text, "logprob": float(logprob), "bytes": list(text.encode())}
    alternatives = [{"token": t, "logprob": float(p), "bytes": list(t.encode())} for t, p in others[:top]]
    return entry | ({"top_logprobs": alternatives} if top else {})
