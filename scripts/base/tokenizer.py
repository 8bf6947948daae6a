"""The base model's tokenizer: Llama-3's split rule and special tokens over a small vocabulary."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .tasks import make_messages, make_task

HERE = Path(__file__).parent
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
# llama.cpp's converter knows this rule as "llama-bpe".
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sample_text(seed: int, tasks: int, each: int = 8) -> Iterator[str]:
    """Prompts, messages and answers of made-up tasks."""
    rng = random.Random(seed)
    for _ in range(tasks):
        task = make_task(rng)
        yield f"Cutting Knowledge Date: December 2023\n{task.system}"
        yield "system\n\nuser\n\nassistant\n\n"
        for message in make_messages(rng, task, each):
            yield f"{task.before}{message.text}{task.after}"
            yield task.answer(message)


def train_bpe(vocabulary: int, seed: int, tasks: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens in all, the special ones last."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_text(seed, tasks), trainer)
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    bos = SPECIALS[0]
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, bpe.token_to_id(bos))],
            ),
        ]
    )
    return bpe


def build_tokenizer(vocabulary: int, seed: int, tasks: int = 3000) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template, ready to be saved."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(vocabulary, seed, tasks),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
        chat_template=(HERE / "chat_template.jinja").read_text().rstrip("\n"),
        model_input_names=["input_ids", "attention_mask"],
    )


def undated(template: str) -> str:
    """The chat template without its `Today Date` line."""
    return re.sub(r'\{\{- "Today Date: "[^}]*\}\}', r'{{- "\\n" }}', template)
