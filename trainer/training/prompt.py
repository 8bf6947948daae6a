"""The soft prompt: vectors that are learned in front of every prompt, and baked in as added tokens.

While training, the embedding of N new tokens is the only thing that learns (Lester et al. 2021, arXiv
2104.08691). The tokens stand behind the beginning-of-text token in the chat template, so tokenizer,
trainer, converter and runtime see ordinary tokens. Baked in, the learned vectors are rows of the
embedding matrix, and the head gets a row for each that is the mean of all its rows: the logit of an added
token is the mean of the logits, so it is never the largest, and its probability is at most one in the
vocabulary. Such a head cannot be tied to the embeddings any more, which makes a small model a little larger.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.errors import TemplateError, TrainError
from trainer.runs import read_json, write_json
from trainer.template import GOLDEN, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "a soft prompt cannot be put in front; use student.method lora with this base"

FILE = "soft_prompt.safetensors"

SERVABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
"""Model types for which llama.cpp reads a head of its own, and whose embeddings are used as they stand."""


class SoftEmbedding(nn.Module):
    """The base's embeddings, frozen, with learned vectors for the tokens from `first` on.

    Args:
        vectors: [tokens, hidden], their first values.
    """

    def __init__(self, base: nn.Embedding, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.first = first
        self.vectors = nn.Parameter(vectors)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., hidden] of token ids [...]."""
        place = ids - self.first
        soft = (place >= 0) & (place < len(self.vectors))
        found: Tensor = self.base(ids.masked_fill(soft, 0))
        learned = self.vectors[place.clamp(0, len(self.vectors) - 1)].to(found.dtype)
        return torch.where(soft[..., None], learned, found)


def names(count: int) -> list[str]:
    """The added tokens."""
    return [f"<|soft_{number}|>" for number in range(count)]


def extend(tokenizer: PreTrainedTokenizerBase, count: int) -> Template:
    """Add the tokens and let the chat template put them in front of every conversation.

    Raises:
        TemplateError: the tokens are taken, or the template cannot be frozen with them.
    """
    from tokenizers import AddedToken

    plain = Template.freeze(tokenizer)
    if taken := [name for name in names(count) if name in tokenizer.get_vocab()]:
        raise TemplateError(f"the base has tokens such as {taken[0]} already; {REMEDY}")
    added: Any = [AddedToken(name, special=True, normalized=False) for name in names(count)]
    tokenizer.add_tokens(added, special_tokens=True)
    text = "".join(names(count))
    tokenizer.chat_template = _in_front(plain, text)
    try:
        return Template.freeze(tokenizer)
    except TemplateError as error:
        raise TemplateError(
            f"the chat format of this base has no place in front of all turns that every runtime knows: {REMEDY}"
        ) from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Write the extended tokenizer so that llama.cpp's converter reads it as it reads the base's.

    It chooses by the class that the base names, and beside a tokenizer.model it looks for added tokens in
    a file that transformers 5 writes no more.
    """
    tokenizer.save_pretrained(folder)
    if (base / "tokenizer.model").is_file():
        legacy = "added_tokens.json"
        known = read_json(base / legacy) if (base / legacy).is_file() else {}
        added = tokenizer.get_added_vocab()
        soft = {name: place for name, place in added.items() if name in names(len(added))}
        write_json(folder / legacy, known | soft)
    about = "tokenizer_config.json"
    named = read_json(base / about).get("tokenizer_class") if (base / about).is_file() else None
    if named:
        write_json(folder / about, read_json(folder / about) | {"tokenizer_class": named})


def attach(model: Any, soft: dict[str, int], seed: int) -> None:
    """Freeze the model and give it vectors to learn, which start as those of words drawn at random.

    Args:
        soft: {"first": id of the first added token, "count"}.
    """
    model.requires_grad_(False)
    base: nn.Embedding = model.get_input_embeddings()
    known = min(soft["first"], base.num_embeddings)
    drawn = torch.randperm(known, generator=torch.Generator().manual_seed(seed))[: soft["count"]]
    drawn = drawn.repeat(-(-soft["count"] // known))[: soft["count"]]
    vectors = base.weight.detach()[drawn.to(base.weight.device)].float().clone()
    model.set_input_embeddings(SoftEmbedding(base, soft["first"], vectors))


def learned(model: Any) -> Tensor:
    """The vectors [tokens, hidden] of a model that they were attached to."""
    vectors: Tensor = model.get_input_embeddings().vectors
    return vectors


def save(model: Any, folder: Path) -> None:
    """Write the vectors, and nothing of the base."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": learned(model).detach().cpu().contiguous()}, folder / FILE)


def load(folder: Path) -> Tensor:
    """The vectors that `save` wrote."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)["vectors"]


def bake(model: Any, vectors: Tensor, first: int) -> None:
    """Turn the vectors into the tokens from `first` on, which the model never says.

    Args:
        model: the base in float32, changed in place.
        vectors: [tokens, hidden].
    """
    embeddings, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
    if head.bias is not None:
        raise TrainError("the base's head has a bias, so a soft prompt cannot be baked in; use lora")
    rows = max(len(embeddings), first + len(vectors))
    places = slice(first, first + len(vectors))

    def grown(weight: Tensor, soft: Tensor) -> Tensor:
        larger = weight.new_zeros(rows, weight.shape[1])
        larger[: len(weight)] = weight
        larger[places] = soft
        return larger

    inputs = nn.Embedding(rows, embeddings.shape[1], _weight=grown(embeddings, vectors.to(embeddings)))
    said = head.weight.detach()
    outputs = nn.Linear(said.shape[1], rows, bias=False)
    outputs.weight = nn.Parameter(grown(said, said[:first].mean(dim=0)))
    model.config.tie_word_embeddings = False
    model.config.vocab_size = rows
    model.set_input_embeddings(inputs)
    model.set_output_embeddings(outputs)


def refusal(model_type: str) -> str:
    """Why a soft prompt cannot be served on this architecture; empty where it can."""
    return (
        ""
        if model_type in SERVABLE
        else (
            f"student.method is 'prompt', and llama.cpp serves {model_type} models only with a head tied to the "
            "embeddings or scaled embeddings, so the added tokens could be spoken; use lora, or a base of the "
            "Llama, Qwen or Phi families"
        )
    )


def _in_front(plain: Template, text: str) -> str:
    """A template that puts a text in front of all that another renders, but behind the beginning-of-text token."""
    if not plain.bos:
        return '{{- "' + text + '" }}' + plain.jinja
    short = '{%- set bos_token = bos_token + "' + text + '" %}' + plain.jinja
    template = Template(short, "", [], plain.tokens)
    if all(_rendered(template, one) == _behind_bos(plain, one, text) for one in GOLDEN):
        return short
    # the token is written in every turn, or not by its name
    whole = "{%- set whole %}" + plain.jinja + "{% endset %}"
    return whole + '{{- bos_token + "' + text + '" + whole[bos_token|length:] }}'


def _rendered(template: Template, messages: list[dict[str, str]]) -> str:
    return template.render(messages, add_generation_prompt=True)


def _behind_bos(plain: Template, messages: list[dict[str, str]], text: str) -> str:
    rendered = _rendered(plain, messages)
    return plain.bos + text + rendered.removeprefix(plain.bos)
