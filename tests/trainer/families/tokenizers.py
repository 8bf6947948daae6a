"""Small tokenizers of the families, trained in the test: byte-level BPE, and SentencePiece BPE with byte fallback.

Each is written the way its family publishes it: tokenizer.json and tokenizer_config.json, and with
SentencePiece tokenizer.model, from which llama.cpp's converter reads pieces and scores.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from tests.tiny import CORPUS, LLAMA3_SPLIT
from tests.tiny_run import INSTRUCTIONS, conversations

QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of GPT-4o's tokenizer, which Phi 4 mini took over."""
TEKKEN_SPLIT = O200K_SPLIT.replace(_SHORT, "").replace(r"\p{N}{1,3}", r"\p{N}")
"""Of Mistral Nemo."""
ROLES = ["system", "user", "assistant", "model", "You are a helpful assistant.", "[INST] x [/INST] y"]
TEXTS = [
    *CORPUS,
    INSTRUCTIONS,
    *ROLES,
    *(row["messages"][1]["content"] + "\n" + row["completion"] for row in conversations(6)),
]


def byte_level(
    folder: Path,
    *,
    split: str,
    special: list[str],
    config: dict[str, Any],
    plain: list[str] | None = None,
    size: int = 512,
    normal_form: bool = False,
    ignore_merges: bool = False,
    bos: str | None = None,
) -> None:
    """Write a byte-level BPE.

    Args:
        split: the regular expression by which text is cut before bytes are merged.
        config: of tokenizer_config.json.
        plain: added tokens that are not special, as Qwen's thinking marks.
        normal_form: whether text is brought to Unicode's form C.
        ignore_merges: whether words of the vocabulary are taken whole.
        bos: the token that every text is begun with.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normal_form:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain or []])
    if bos is not None:
        tokenizer.post_processor = _begins(tokenizer, bos)
    _write(folder, tokenizer, config)


def sentence_piece(
    folder: Path,
    *,
    config: dict[str, Any],
    begin: str,
    end: str,
    ids: tuple[int, int, int],
    pieces: list[str] | None = None,
    added: list[AddedToken] | None = None,
    spaces: str = "prefix",
    begins: bool = True,
    size: int = 640,
) -> None:
    """Write a SentencePiece BPE with byte fallback.

    Args:
        ids: of the unknown, the beginning and the end token.
        pieces: user-defined symbols inside the model, as Gemma's turns are.
        added: tokens behind the model's pieces, as Phi 3's turns are.
        spaces: "prefix" puts a space before every text; "none" does not (Gemma).
        begins: whether every text is begun with the beginning token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = spaces == "prefix"
    trained = _trained(begin=begin, end=end, ids=ids, pieces=pieces or [], prefixed=prefixed, size=size)
    (folder / "tokenizer.model").write_bytes(trained)
    extracted: Any = SentencePieceExtractor(str(folder / "tokenizer.model")).extract(models.BPE)
    merging = models.BPE(
        extracted["vocab"], extracted["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(merging)
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefixed else replaced
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<unk>", begin, end)]
    turns = [AddedToken(text, special=text.startswith("<"), normalized=False) for text in pieces or []]
    tokenizer.add_special_tokens([token for token in [*special, *turns, *(added or [])] if token.special])
    tokenizer.add_tokens([token for token in [*turns, *(added or [])] if not token.special])
    if begins:
        tokenizer.post_processor = _begins(tokenizer, begin)
    _write(folder, tokenizer, config)


def _trained(
    *, begin: str, end: str, ids: tuple[int, int, int], pieces: list[str], prefixed: bool, size: int
) -> bytes:
    """tokenizer.model, as SentencePiece writes it."""
    written = io.BytesIO()
    unknown, first, last = ids
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS * 4 for line in text.split("\n") if line]),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefixed,
        hard_vocab_limit=False,
        unk_id=unknown,
        bos_id=first,
        eos_id=last,
        pad_id=0 if unknown else -1,
        bos_piece=begin,
        eos_piece=end,
        user_defined_symbols=pieces,
        minloglevel=2,
    )
    return written.getvalue()


def _begins(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(identity): {
            "content": token.content,
            "special": token.special,
            "rstrip": token.rstrip,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "single_word": token.single_word,
        }
        for identity, token in tokenizer.get_added_tokens_decoder().items()
    }
    about = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | config, indent=1))
