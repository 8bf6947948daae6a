"""The base model: Llama's architecture, small."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THETA = 500000.0
STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int = 192, layers: int = 4, seed: int = 0
) -> LlamaForCausalLM:
    """A fresh model of about 2.7 million parameters, in fp32."""
    stops = [tokenizer.convert_tokens_to_ids(name) for name in STOPS]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 10 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        rope_theta=THETA,
        rope_scaling=dict(ROPE),
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model (bf16) and tokenizer in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config = model.generation_config
    copy.save_pretrained(str(folder))
    add_older_keys(folder)


def add_older_keys(folder: Path) -> None:
    """Adds transformers 4's keys beside those of 5: other programs read only the older ones."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta", THETA)
    config["rope_scaling"] = rope
    config["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    for file in folder.iterdir():  # safetensors writes 0600
        if file.is_file():
            file.chmod(0o644)
