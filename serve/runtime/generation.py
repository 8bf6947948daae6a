"""One GGUF in this process: rendered by its own Jinja template, generated with log-probabilities.

llama-cpp-python's own server sorts the whole vocabulary in Python for the log-probabilities of every
token, keeps the logits of the whole context (1 GB at 2,048 tokens of Llama 3), cuts tokens of more than 32
bytes and penalises repeats by 1.1 unless told otherwise, greedy answers included. So the loop is ours,
over its `Llama`.
"""

from __future__ import annotations

import codecs
import ctypes
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
from llama_cpp import LlamaGrammar
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from serve.errors import ApiError, EmbeddedError

TEMPLATE = "tokenizer.chat_template"
BLOCK = 64
"""Prompt tokens read at a time, and the grain in which a prompt's beginning is reused."""


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. Nothing else shapes the distribution: no top-k, no min-p, no penalties."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    schema: str | None = None
    """JSON schema that the answer has to follow, as text; a grammar then rules out all other tokens."""


Told = Callable[[str, "dict[str, Any] | None"], None]
"""Hears of every token as it is drawn: the text that is certain by now, and its log-probabilities."""


@dataclass(frozen=True)
class Generated:
    """An answer; `tokens` are OpenAI's `logprobs.content`, None where they were not asked for."""

    text: str
    finish_reason: str
    tokens: list[dict[str, Any]] | None
    prompt_tokens: int
    completion_tokens: int


class Generator:
    """Answers conversations, one at a time; the blocks that a prompt shares with the last one are not read again."""

    def __init__(self, llama: llama_cpp.Llama) -> None:
        """
        Raises:
            EmbeddedError: the GGUF holds no chat template.
        """
        template = llama.metadata.get(TEMPLATE)
        if not template:
            raise EmbeddedError(f"{llama.model_path} holds no {TEMPLATE}; export it with its chat template")
        self._llama = llama
        self._vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
        self._start = _decoder_start(llama)
        self._pieces: dict[int, bytes] = {}
        self._added = () if self._start is None else self._user_defined()
        self._last_prompt: list[int] = []
        self._lock = threading.Lock()
        self._render = Jinja2ChatFormatter(
            template=template,
            eos_token=self._special(llama.token_eos()),
            bos_token=self._special(llama.token_bos()),
        )

    @classmethod
    def load(cls, gguf: Path, context: int, threads: int, adapter: Path | None = None) -> Generator:
        """Load a model for prompts and answers of `context` tokens together.

        Args:
            adapter: a GGUF LoRA adapter for it.

        Raises:
            EmbeddedError: the file is no model that llama.cpp can load, or has no chat template, or the
                adapter is not one of it.
        """
        llama = _loaded(gguf, context, threads, BLOCK)
        if _decoder_start(llama) is not None:
            whole = llama.n_ctx()  # an encoder reads a prompt at once; llama.cpp has rounded the context up
            llama.close()
            llama = _loaded(gguf, whole, threads, whole)
        if adapter is not None:
            _adapt(llama, adapter)
        return cls(llama)

    def render(self, messages: Sequence[dict[str, str]]) -> tuple[str, list[int]]:
        """The prompt's text and tokens. The template writes the begin-of-text token; none is added to it."""
        try:
            text: str = self._render(
                messages=cast(Any, list(messages))
            ).prompt  # it asks for OpenAI's TypedDicts
        except Exception as error:  # a template may raise anything
            raise ApiError(400, f"the model's chat template refuses these messages ({error})") from error
        return text, self._llama.tokenize(text.encode(), add_bos=False, special=True)

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        sampling: Sampling,
        stopped: Callable[[], bool],
        told: Told | None = None,
    ) -> Generated:
        """Generate to the end of the turn, the longest allowed answer, or until `stopped()`.

        Args:
            told: the texts that it hears are together the answer's.

        Raises:
            ApiError: the conversation does not fit into the context, or the schema is none.
        """
        with self._lock:  # llama.cpp's context is one: whoever comes too early waits here
            return self._generated(self._prompt(messages), sampling, stopped, told)

    def _prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        prompt = self.render(messages)[1]
        if len(prompt) >= self._llama.n_ctx():
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, the context holds {self._llama.n_ctx()}; send less",
                code="context_length_exceeded",
            )
        return prompt

    def _generated(
        self, prompt: list[int], sampling: Sampling, stopped: Callable[[], bool], told: Told | None
    ) -> Generated:
        room = self._llama.n_ctx() - len(prompt)
        longest = min(sampling.max_tokens or room, room)
        data, tokens, count, reason = b"", [], 0, "length"
        spoken = _Spoken(sampling.stop, told)
        for token in self._tokens(prompt, sampling):
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                reason = "stop"
                break
            entry = self._entry(token, data, sampling.top_logprobs) if sampling.logprobs else None
            data += self._said(token, data)
            count += 1
            if entry:
                tokens.append(entry)
            end = _stop_at(data, sampling.stop)
            if end is not None:
                data, reason = data[:end], "stop"
                spoken.last(data, entry)
                break
            spoken.next(data, entry)
            if count >= longest or stopped():
                break
        spoken.last(data, None)
        text = data.decode(errors="replace")
        return Generated(text, reason, tokens if sampling.logprobs else None, len(prompt), count)

    def _tokens(self, prompt: list[int], sampling: Sampling) -> Any:
        grammar = _grammar(sampling.schema)
        # llama.cpp would begin every answer's draws at the same place
        self._llama.set_seed(secrets.randbits(31) if sampling.seed is None else sampling.seed)
        if self._start is None:
            self._rewind(prompt)
        else:
            self._encode(prompt)
        return self._llama.generate(
            prompt if self._start is None else [self._start],
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            repeat_penalty=1.0,
            grammar=grammar,
        )

    def _rewind(self, prompt: list[int]) -> None:
        """Keep of the last prompt only whole blocks that this one begins with.

        A token's logits depend, in the last digits, on how many tokens are read together. Whole blocks
        are always read alike, so the same prompt gives the same log-probabilities whatever was asked
        before: what was certified is what is served.
        """
        shared = next(
            (
                at
                for at, (one, other) in enumerate(zip(prompt, self._last_prompt, strict=False))
                if one != other
            ),
            min(len(prompt), len(self._last_prompt)),
        )
        kept = min(shared, len(prompt) - 1) // BLOCK * BLOCK
        self._llama.n_tokens = min(kept, self._llama.n_tokens // BLOCK * BLOCK)
        self._last_prompt = prompt

    def _encode(self, prompt: list[int]) -> None:
        """Let an encoder-decoder read the prompt; its decoder begins anew."""
        count = len(prompt)
        tokens = (llama_cpp.llama_token * count)(*prompt)  # the batch only points to these two
        outputs = (ctypes.c_int8 * count)(*[1] * count)
        batch = llama_cpp.llama_batch_get_one(tokens, count)
        batch.logits = ctypes.cast(outputs, ctypes.POINTER(ctypes.c_int8))  # the decoder looks at all of them
        code = llama_cpp.llama_encode(self._llama.ctx, batch)
        if code:
            raise RuntimeError(f"llama_encode returned {code}")
        self._llama.n_tokens = 0

    def _said(self, token: int, before: bytes) -> bytes:
        """What a token adds to an answer.

        SentencePiece opens a text with a space; no answer was trained with one, and DSPy's headers stand
        first. T5's words all begin with one, those behind an added character too.
        """
        piece = self._piece(token)
        return piece.lstrip(b" ") if not before or before.endswith(self._added) else piece

    def _entry(self, token: int, before: bytes, top: int) -> dict[str, Any]:
        """The token just drawn, with the logarithms of the probabilities before temperature.

        Its text is what it adds to the answer, so that the texts of all tokens are the answer.
        """
        logprobs = self._logprobs()
        best = np.argpartition(logprobs, -top)[-top:] if top else np.empty(0, dtype=np.intp)
        ordered = best[np.argsort(-logprobs[best], kind="stable")]
        return {
            **self._named(token, before, logprobs),
            "top_logprobs": [self._named(int(other), before, logprobs) for other in ordered],
        }

    def _named(self, token: int, before: bytes, logprobs: NDArray[np.float32]) -> dict[str, Any]:
        piece = self._said(token, before)
        return {
            "token": piece.decode(errors="replace"),
            "logprob": float(logprobs[token]),
            "bytes": list(piece),
        }

    def _logprobs(self) -> NDArray[np.float32]:
        """Log-softmax over the vocabulary, shape (vocabulary,), of the last position."""
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),))
        highest = logits.max()
        shifted: NDArray[np.float32] = logits - (highest + np.log(np.exp(logits - highest).sum()))
        return shifted

    def _piece(self, token: int) -> bytes:
        """The token's bytes; none for control tokens."""
        if token not in self._pieces:
            self._pieces[token] = self._text(token, special=False)
        return self._pieces[token]

    def _user_defined(self) -> tuple[bytes, ...]:
        """Texts of the tokens that were added to the vocabulary."""
        kind = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        known = range(self._llama.n_vocab())
        return tuple(
            self._piece(token)
            for token in known
            if llama_cpp.llama_vocab_get_attr(self._vocabulary, token) & kind
        )

    def _special(self, token: int) -> str:
        return self._text(token, special=True).decode() if token >= 0 else ""

    def _text(self, token: int, *, special: bool, size: int = 64) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        length: int = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, special)
        return bytes(buffer.raw[:length]) if length >= 0 else self._text(token, special=special, size=-length)


class _Spoken:
    """Tells of an answer while it grows: whole characters, and nothing that may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str], told: Told | None) -> None:
        self._told = told
        self._held = max((len(stop.encode()) - 1 for stop in stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._said = 0

    def next(self, data: bytes, entry: dict[str, Any] | None) -> None:
        """All that was generated so far, and the token that was drawn last."""
        if self._told:
            end = max(self._said, len(data) - self._held)
            text = self._decoder.decode(data[self._said : end])
            self._said = end
            self._told(text, entry)

    def last(self, data: bytes, entry: dict[str, Any] | None) -> None:
        """The rest of the whole answer."""
        if self._told:
            text = self._decoder.decode(data[self._said :], final=True)
            self._said = len(data)
            if text or entry:
                self._told(text, entry)


def _loaded(gguf: Path, context: int, threads: int, batch: int) -> llama_cpp.Llama:
    try:
        return llama_cpp.Llama(
            str(gguf),
            n_ctx=context,
            n_batch=batch,
            n_ubatch=batch,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        raise EmbeddedError(f"{gguf} cannot be loaded ({error}); export the model again") from error


def _decoder_start(llama: llama_cpp.Llama) -> int | None:
    """The token that an encoder-decoder's answers start from; None for a model that continues its prompt."""
    if not llama_cpp.llama_model_has_encoder(llama.model):
        return None
    return int(llama_cpp.llama_model_decoder_start_token(llama.model))


def _adapt(llama: llama_cpp.Llama, adapter: Path) -> None:
    """Put an adapter on, at the scale that it was trained with; llama.cpp frees it with the model.

    llama-cpp-python's own `lora_path` would read the base into this process's memory instead of mapping
    its file, which all processes on the same base share.
    """
    loaded = llama_cpp.llama_adapter_lora_init(llama.model, str(adapter).encode())
    if not loaded:
        raise EmbeddedError(
            f"{adapter} is no LoRA adapter of {llama.model_path}; export the model again, "
            "or restore the base that it was made for"
        )
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    scales = (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, 1, scales):
        raise EmbeddedError(f"{adapter} cannot be put on {llama.model_path}; export the model again")


def _grammar(schema: str | None) -> Any:
    if schema is None:
        return None
    try:
        return LlamaGrammar.from_json_schema(schema, verbose=False)
    except Exception as error:  # whatever its parser stumbles over, the schema is at fault
        raise ApiError(
            400,
            f"the JSON schema cannot be followed ({type(error).__name__}: {error}); send a simpler one",
            param="response_format",
        ) from error


def _stop_at(data: bytes, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, if there is one."""
    places = [place for stop in stops if (place := data.find(stop.encode())) >= 0]
    return min(places, default=None)
