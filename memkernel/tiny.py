"""Checkpoints with random weights, in the published layout: for the demo, the tests and the benchmarks."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from memkernel.config import ModelConfig
from memkernel.weights import expected_shapes

MEMORYLLM = {
    "model_type": "llama",  # as the published 8B checkpoints say
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "num_blocks": 8,
    "num_tokens": 16,
    "add_bos_embedding": True,
    "drop_memory_per_layer": True,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_checkpoint(folder: str | Path, config: dict = MEMORYLLM, seed: int = 0, initialized: bool = False) -> Path:
    """Write config.json and model.safetensors (float32) with normal random weights; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(ModelConfig.from_dict(config)).items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if name == "memory" else 0.08)
        if "norm" in name:
            tensors[name] += 1
    if "initialized" in tensors:
        tensors["initialized"] = torch.tensor(int(initialized), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_tokenizer(folder: str | Path) -> None:
    """Write a tokenizer of 256 bytes and <unk>, <s>, </s>, <pad> (ids 256 to 259), with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = {token: i for i, token in enumerate([*alphabet, *special.values()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)
    fast.save_pretrained(folder)
