"""T5's vocabulary made to write lines and braces, without a row more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, T5ForConditionalGeneration

from tests.trainer.families import encoder_decoders
from trainer.conversion import t5
from trainer.errors import TrainError
from trainer.template import Template

ANSWER = '[[ ## label ## ]]\nred and {"a": 1}\n\n[[ ## completed ## ]]'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_decoders.write(encoder_decoders.FLAN, tmp_path_factory.mktemp("t5") / "base")


@pytest.fixture(scope="module")
def ready(base: Path) -> Path:
    return t5.ready(base, base.parent / "cache")


def loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_an_answer_of_several_lines_comes_back_as_it_was(base: Path, ready: Path) -> None:
    tokenizer = loaded(ready)
    ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    said = tokenizer.decode(ids).splitlines()
    assert [said[0], said[2], said[3]] == [line for line in ANSWER.splitlines() if "{" not in line]
    assert said[1].replace(" ", "") == 'redand{"a":1}', "spaces beside a brace are not kept"
    assert "\n" not in loaded(base).decode(loaded(base)(ANSWER)["input_ids"])


@pytest.mark.parametrize(
    "text", ['{"a": "red\\nblue"}', "<b>red</b>", "one<two", "a\\b", "(red){blue}", '["it is", "red"]']
)
def test_text_without_spaces_beside_such_characters_comes_back_exactly(ready: Path, text: str) -> None:
    tokenizer = loaded(ready)
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert back.replace(": ", ":").replace(", ", ",") == text.replace(": ", ":").replace(", ", ",")


def test_the_characters_that_are_missing_take_sentinels_from_the_end(base: Path, ready: Path) -> None:
    taken = json.loads((ready / "added_tokens.json").read_text())
    assert {"\n", "{", "}", "<"} <= set(taken)
    assert "a" not in taken
    last = loaded(base).convert_tokens_to_ids("<extra_id_0>")
    assert sorted(taken.values()) == list(range(last - len(taken) + 1, last + 1))
    assert len(loaded(ready)) == len(loaded(base))
    assert loaded(ready)("<extra_id_0>")["input_ids"] != [last], "text no longer means a sentinel"


def test_other_text_is_read_as_it_was(base: Path, ready: Path) -> None:
    text = "The door is red, and  the caf\u00e9 \ufb01ne"
    assert loaded(ready)(text)["input_ids"] == loaded(base)(text, add_special_tokens=False)["input_ids"]


def test_a_conversation_ends_every_message(ready: Path) -> None:
    tokenizer = loaded(ready)
    template = Template.freeze(tokenizer)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(talk, add_generation_prompt=True) == "Be brief.</s>Hi</s>"
    assert template.answer("Yes") == "Yes</s>"
    assert template.prompt_ids(tokenizer, talk)[-1] == tokenizer.eos_token_id


def test_it_is_made_once(base: Path, ready: Path) -> None:
    before = (ready / "tokenizer.json").stat().st_mtime_ns
    assert t5.ready(base, base.parent / "cache") == ready
    assert (ready / "tokenizer.json").stat().st_mtime_ns == before
    assert list(ready.parent.iterdir()) == [ready]
    assert ready.stat().st_mode & 0o777 == 0o755


def test_weights_that_a_link_of_the_base_names_anew_are_seen(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    shutil.move(copy / "model.safetensors", one)
    shutil.copyfile(one, other)
    (copy / "model.safetensors").symlink_to(one)
    made = t5.ready(copy, tmp_path / "cache")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(other)
    assert (t5.ready(copy, tmp_path / "cache") / "model.safetensors").resolve() == other
    assert (made / "model.safetensors").resolve() == other


def test_the_weights_are_the_bases_own(base: Path, ready: Path) -> None:
    assert (ready / "model.safetensors").resolve() == (base / "model.safetensors").resolve()
    model = T5ForConditionalGeneration.from_pretrained(ready)
    assert not model.config.scale_decoder_outputs
    assert not (model.lm_head.weight == model.shared.weight).all()


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({}, True),  # t5-small, as published
        ({"tie_word_embeddings": False}, False),  # Flan-T5, as published
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),  # Flan-T5, by transformers 5
    ],
)
def test_which_head_is_scaled(config: dict[str, Any], scaled: bool) -> None:
    assert t5.scales(config) is scaled


def test_a_sentencepiece_bpe_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "config.json").write_text("{}")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        model_type="bpe",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(TrainError, match="is no unigram model"):
        t5.ready(tmp_path, tmp_path / "cache")
    assert list((tmp_path / "cache" / "t5").iterdir()) == []
