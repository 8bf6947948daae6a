"""T5 and Flan-T5 made to hold a conversation: line ends and braces in their vocabulary, and a chat format.

T5's vocabulary has no line end, no braces and no backslash, without which DSPy's fields and JSON can be
neither read nor written. It has a hundred sentinels, which text never holds, and which the model learned
to read and to write one from another when it was pretrained to fill gaps (Raffel et al. 2020, section
3.1.4). The characters that are missing take the last sentinels' places: no vector is added and every
method can learn them. A conversation is its messages, each ended by `</s>`: the encoder reads it, the
decoder answers. A word behind one of these characters is written without the space that every word of T5
begins with.

The folder made here stands in for the base everywhere, so no later stage has to know of this.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainer.errors import TrainError
from trainer.runs import sha256_file, sha256_json, write_json, write_text

SENTENCE_PIECE = "spiece.model"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CHAT = "{%- for message in messages %}{{- message['content'] + eos_token }}{%- endfor %}"
NEEDED = "\n" + string.punctuation + string.digits + string.ascii_letters
"""What a vocabulary must be able to tell apart; spaces it knows as the beginning of a word."""
SENTINELS = 100
NORMAL = 1
"""SentencePiece's type of a piece of text."""
NEVER = -10_000.0
"""Score of a sentinel's place in the vocabulary that stays unused, as llama.cpp's converter writes it."""
LAYOUT = 1
"""Of the folder made here; a new one is made where this changes."""


def ready(base: Path, cache: Path) -> Path:
    """The folder, made once, of the base with the tokenizer and chat format described above.

    Args:
        base: in the Hugging Face layout; its weights are linked.
        cache: of all tasks.

    Raises:
        TrainError: the base has no SentencePiece model, or one of another kind than T5's.
    """
    pieces = base / SENTENCE_PIECE
    if not pieces.is_file():
        raise TrainError(
            f"{base} holds no {SENTENCE_PIECE}, from which T5's tokenizer is read; "
            "add the file from the model's publisher"
        )
    weights = sorted(file.name for pattern in WEIGHTS for file in base.glob(pattern))
    described = [pieces, base / "config.json", base / "generation_config.json"]
    hashes = [sha256_file(file) for file in described if file.is_file()]
    identity = [LAYOUT, str(base.resolve()), *weights, *hashes]
    place = cache / "t5" / sha256_json(identity)[:16]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            _write(base, made)
            made.chmod(0o755)  # other users of this home read it too
            os.rename(made, place)
        except OSError:
            if not place.is_dir():  # or else another process was quicker
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


def scales(config: dict[str, Any]) -> bool:
    """Whether what goes into the head is multiplied by 1 / √d_model: T5's first version, whose head is its embeddings.

    Args:
        config: the parsed config.json, of a publisher or as transformers 5 writes it.
    """
    return bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)))


def teach(t5_model: Any) -> None:
    """Let the converter's class of T5 models write a head that needs no scaling, which llama.cpp would leave out.

    And that a prompt is not ended a second time.
    """
    write: Callable[..., Iterable[tuple[str, Any]]] = t5_model.modify_tensors
    prepare: Callable[..., None] = t5_model.prepare_metadata

    def modify_tensors(model: Any, data: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
        embeddings = not model.shared_token_embeddings_found
        if not scales(model.hparams):
            yield from write(model, data, name, layer)
        elif name != "lm_head.weight":
            yield from write(model, data, name, layer)
            if embeddings and model.shared_token_embeddings_found:
                yield from write(model, data * model.hparams["d_model"] ** -0.5, "lm_head.weight", layer)

    def prepare_metadata(model: Any, vocab_only: bool) -> None:
        prepare(model, vocab_only=vocab_only)
        model.gguf_writer.add_add_eos_token(False)

    t5_model.modify_tensors = modify_tensors
    t5_model.prepare_metadata = prepare_metadata


def _write(base: Path, folder: Path) -> None:
    for pattern in WEIGHTS:
        for file in base.glob(pattern):
            (folder / file.name).symlink_to(base.resolve() / file.name)
    for name in ("config.json", "generation_config.json", SENTENCE_PIECE):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer, taken = _tokenizer(base / SENTENCE_PIECE)
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    write_json(folder / "added_tokens.json", taken)  # where llama.cpp's converter looks for them
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT,
    }
    write_json(folder / "tokenizer_config.json", about)


def _tokenizer(pieces: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """tokenizer.json's content, and the token of each character that took a sentinel's place."""
    from transformers.convert_slow_tokenizer import T5Converter

    asked: Any = SimpleNamespace(
        vocab_file=str(pieces), _extra_ids=SENTINELS, convert_tokens_to_ids=lambda _: 1
    )
    converter = T5Converter(asked)
    if converter.proto.trainer_spec.model_type != 1:
        raise TrainError(
            f"{pieces} is no unigram model, which T5's is; use a T5 base, or one of another family"
        )
    converted: Any = converter.converted()
    parsed: dict[str, Any] = json.loads(converted.to_str())
    vocabulary = parsed["model"]["vocab"]
    known = {each for piece in converter.proto.pieces if piece.type == NORMAL for each in piece.piece}
    missing = [character for character in NEEDED if character not in known]
    for at in range(len(vocabulary) - SENTINELS, len(vocabulary)):
        vocabulary[at] = [f"[PAD{at}]", NEVER]
    taken = {character: len(vocabulary) - 1 - at for at, character in enumerate(missing)}
    for character, at in taken.items():
        vocabulary[at][0] = character
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parsed["added_tokens"] += [
        {"id": at, "content": character, "special": False} | plain
        for character, at in sorted(taken.items(), key=lambda each: each[1])
    ]
    parsed["post_processor"] = None  # the chat format writes the end itself
    tight = [
        {"type": "Replace", "pattern": {"Regex": f"{re.escape(character)} +"}, "content": character}
        for character in taken
    ]
    parsed["decoder"] = {"type": "Sequence", "decoders": [parsed["decoder"], {"type": "Fuse"}, *tight]}
    return parsed, taken
