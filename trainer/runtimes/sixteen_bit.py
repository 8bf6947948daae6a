"""Greedy answers of the 16-bit weights, in a process of its own so that their memory is given back.

    python -m trainer.runtimes.sixteen_bit REQUEST.json ANSWERS.json

REQUEST holds `model` (folder), `prompts` (token ids), `max_tokens`, `ends` (ids that end an answer),
`pad` and `batch`; ANSWERS gets one list of generated ids per prompt, the ending id left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from trainer.conversion.families import attention, auto_class
from trainer.runs import read_json, write_json


def answers(request: dict[str, Any]) -> list[list[int]]:
    """Generate in batches of similar length, padded on the left.

    Args:
        request: as REQUEST above.

    Returns:
        Generated token ids in the order of the prompts.
    """
    cuda = torch.cuda.is_available()
    # on a CPU the 16-bit values are computed with in 32 bits, which is faster there and never less exact
    dtype = "auto" if cuda else torch.float32
    config = AutoConfig.from_pretrained(request["model"], local_files_only=True)
    model: Any = auto_class(config.model_type).from_pretrained(
        request["model"],
        config=config,
        dtype=dtype,
        attn_implementation=attention(config.model_type),
        local_files_only=True,
    )
    model = model.to("cuda" if cuda else "cpu").eval()
    prompts: list[list[int]] = request["prompts"]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), request["batch"]):
        batch = order[start : start + request["batch"]]
        for index, ids in zip(batch, _generate(model, [prompts[i] for i in batch], request), strict=True):
            found[index] = ids
    return found


def _generate(model: Any, prompts: list[list[int]], request: dict[str, Any]) -> list[list[int]]:
    width = max(len(ids) for ids in prompts)
    pad, ends = request["pad"], _ends(model, request)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=request["max_tokens"], eos_token_id=sorted(ends), pad_token_id=pad
    )
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    before = 1 if model.config.is_encoder_decoder else width  # a decoder of its own repeats no prompt
    return [_until(row, ends) for row in rows[:, before:].tolist()]


def _ends(model: Any, request: dict[str, Any]) -> set[int]:
    """Ids that end an answer: the template's, and those that the weights name, as llama.cpp does."""
    named = model.generation_config.eos_token_id
    return {*request["ends"], *(named if isinstance(named, list) else [named] if named is not None else [])}


def _until(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def main() -> None:
    """Answer the request file named on the command line."""
    request, result = (Path(argument) for argument in sys.argv[1:])
    write_json(result, answers(read_json(request)))


if __name__ == "__main__":
    main()
