"""A tiny random Llama for tests: Llama-3's special tokens, split regex, rope scaling and chat format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CORPUS = [
    "Your input fields are: `text` (str). Your output fields are: `label` (str).",
    "[[ ## text ## ]]\nThe printer is broken again.\n\n[[ ## label ## ]]\nhardware\n\n[[ ## completed ## ]]",
    "[[ ## text ## ]]\nThe invoice of May is wrong.\n\n[[ ## label ## ]]\nbilling\n\n[[ ## completed ## ]]",
]


def tiny_tokenizer(vocabulary: int = 512, corpus: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about `vocabulary` tokens that splits as Llama 3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus or CORPUS) * 4, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    bos = SPECIAL_TOKENS[0]
    add_bos = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_bos])
    fast: PreTrainedTokenizerFast = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
    return fast


def tiny_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """Random weights (seed 0), tied embeddings, Llama-3 rope scaling."""
    ends: Any = [
        tokenizer.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    torch.manual_seed(0)
    model: LlamaForCausalLM = cast(Any, LlamaForCausalLM)(config)
    model.generation_config = cast(Any, GenerationConfig)(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends
    )
    return model


def tiny_base(folder: Path, *, hidden: int = 64, layers: int = 2, vocabulary: int = 512) -> Path:
    """Write the model in bfloat16 with its tokenizer to `folder`, in the Hugging Face layout.

    `hidden` must be a multiple of 32 for q8_0 and of 256 for q4_k_m without fallbacks.
    """
    tokenizer = tiny_tokenizer(vocabulary)
    tokenizer.save_pretrained(folder)
    cast(Any, tiny_model(tokenizer, hidden, layers)).to(torch.bfloat16).save_pretrained(folder)
    return folder
