"""config.json: the published layouts, both spellings of RoPE, frequencies against transformers, and what is refused."""

import json
import re
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from memkernel.config import Lora, ModelConfig, Rope

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA_3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1 = LLAMA_3 | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": LLAMA_3_ROPE,
}
LLAMA_3_2 = LLAMA_3_1 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
LORA = {
    "inference_mode": False,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "r": 16,
    "target_modules": ["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"],
}
MEMORYLLM_8B = LLAMA_3 | {
    "_name_or_path": "meta-llama/Meta-Llama-3-8B",
    "add_bos_embedding": True,
    "add_decoder_lora": True,
    "architectures": ["MemoryLLM"],
    "drop_memory_per_layer": True,
    "lora_config": LORA,
    "num_blocks": 50,
    "num_memory_tokens": 12800,
    "num_tokens": 256,
    "pad_token_id": 128001,
    "rope_scaling": {"factor": 1.8125, "type": "linear"},
}
MEMORYLLM_8B_CHAT = MEMORYLLM_8B | {
    "_attn_implementation_autoset": True,
    "eos_token_id": 128009,
    "model_type": "memoryllm",
}
MEMORYLLM_7B = LLAMA_2 | {
    "add_bos_embedding": True,
    "interpolate_position_ids": True,
    "num_blocks": 30,
    "num_tokens": 256,
    "shrink_to_one_embedding": True,
    "use_negative_position_ids": False,
}

SHAPE_2 = (32000, 4096, 11008, 32, 32, 32, 128, 1e-5)  # V, E, F, L, H, G, D, eps
SHAPE_3 = (128256, 4096, 14336, 32, 32, 8, 128, 1e-5)
SHAPE_3_2 = (128256, 2048, 8192, 16, 32, 8, 64, 1e-5)
ENDS = (128001, 128008, 128009)
ROPE_3_1, ROPE_3_2 = (Rope(5e5, "llama3", factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
ROPE_8B, ROPE_7B = Rope(5e5, "linear", 1.8125), Rope(1e4, "linear", 1.9375)  # 7B: (30 + 1) * 256 positions into 4096
OF_8B = (12800, 256, True, True, Lora(16, 2.0, ("q_proj", "v_proj", "k_proj", "up_proj", "gate_proj")), True)
PUBLISHED = {
    "llama-2": (LLAMA_2, ModelConfig(*SHAPE_2, Rope(1e4), False, (2,))),
    "llama-3": (LLAMA_3, ModelConfig(*SHAPE_3, Rope(5e5), False, (128001,))),
    "llama-3.1": (LLAMA_3_1, ModelConfig(*SHAPE_3, ROPE_3_1, False, ENDS)),
    "llama-3.2": (LLAMA_3_2, ModelConfig(*SHAPE_3_2, ROPE_3_2, True, ENDS)),
    "memoryllm-8b": (MEMORYLLM_8B, ModelConfig(*SHAPE_3, ROPE_8B, False, (128001,), *OF_8B)),
    "memoryllm-8b-chat": (MEMORYLLM_8B_CHAT, ModelConfig(*SHAPE_3, ROPE_8B, False, (128009,), *OF_8B)),
    "memoryllm-7b": (MEMORYLLM_7B, ModelConfig(*SHAPE_2, ROPE_7B, False, (2,), 7680, 256, True)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout(name):
    raw, config = PUBLISHED[name]
    assert ModelConfig.from_dict(raw) == config
    assert config.has_memory == name.startswith("memoryllm")


@pytest.mark.parametrize("spelling", ["to_dict", "save_pretrained", "rope_parameters", "rope_type", "both-types"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_other_spellings_mean_the_same(name, spelling, tmp_path):
    raw, config = deepcopy(PUBLISHED[name])  # transformers writes into a rope_scaling that it is given
    rope = raw["rope_scaling"] or {"rope_type": "default"}
    kind = rope.get("rope_type", rope.get("type"))
    if spelling == "to_dict":
        found = ModelConfig.from_dict(LlamaConfig(**raw).to_dict())
    elif spelling == "save_pretrained":
        LlamaConfig(**raw).save_pretrained(tmp_path)
        assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
        found = ModelConfig.from_folder(tmp_path)
    elif spelling == "rope_parameters":
        moved = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta")}
        moved["rope_parameters"] = rope | {"rope_theta": raw.get("rope_theta", 1e4)}
        found = ModelConfig.from_dict(moved)
    else:
        numbers = {key: value for key, value in rope.items() if key not in ("rope_type", "type")}
        names = ("rope_type", "type") if spelling == "both-types" else ("rope_type",)
        found = ModelConfig.from_dict(raw | {"rope_scaling": numbers | dict.fromkeys(names, kind)})
    assert found == config


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "memoryllm-7b"])
def test_rotations_equal_transformers(name):
    """To the rounding of an angle in float32: position * frequency, the frequency rounded a few times."""
    raw, config = deepcopy(PUBLISHED[name])
    theirs, D, length = LlamaRotaryEmbedding(LlamaConfig(**raw)), config.head_size, 13_057
    stretched = config.rope.factor if config.rope.kind == "linear" else 1.0  # ours divides the positions instead
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(config.rope.frequencies(D) / stretched, theirs.inv_freq, rtol=2 * ulp, atol=0)
    cos, sin = config.rope.table(length, D, torch.device("cpu"))
    want_cos, want_sin = (x[0, :, : D // 2] for x in theirs(cos, torch.arange(length)[None]))
    slack = ulp * (2 + 2 * torch.arange(length)[:, None] * theirs.inv_freq)
    for got, want in ((cos, want_cos), (sin, want_sin)):
        assert got.shape == (length, D // 2) and got.dtype == torch.float32
        assert ((got - want).abs() <= slack).all()
    assert torch.equal(cos[0], torch.ones(D // 2)) and torch.equal(sin[0], torch.zeros(D // 2))


def test_defaults_of_absent_keys():
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    config = ModelConfig.from_dict({name: LLAMA_2[name] for name in names})
    assert config == ModelConfig(*SHAPE_2[:-1], 1e-6, Rope(1e4), False, ())
    config = ModelConfig.from_dict({name: LLAMA_2[name] for name in names} | {"num_blocks": 2, "num_tokens": 8})
    assert config == ModelConfig(*SHAPE_2[:-1], 1e-6, Rope(1e4), False, (), 16, 8, True, False, None, False)
    short = MEMORYLLM_7B | {"num_blocks": 4}  # it fits into the trained range: nothing to squeeze
    assert ModelConfig.from_dict(short).rope == Rope(1e4, "linear", 1.0)


LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED = [  # a key, dotted where it is nested, and values that it cannot have
    (LLAMA_3_1, "model_type", "mistral"),
    (LLAMA_3_1, "attention_bias", True),
    (LLAMA_3_1, "mlp_bias", True),
    (LLAMA_3_1, "hidden_act", "gelu"),
    (LLAMA_3_1, "quantization_config", {"quant_method": "gptq"}),
    (LLAMA_3_1, "sliding_window", 4096),
    (LLAMA_3_1, "hidden_size", None, 4096.0, "4096"),
    (LLAMA_3_1, "intermediate_size", None, [14336]),
    (LLAMA_3_1, "num_attention_heads", True, 24),
    (LLAMA_3_1, "num_key_value_heads", 3),
    (LLAMA_3_1, "head_dim", 0, 127),
    (LLAMA_3_1, "vocab_size", -1),
    (LLAMA_3_1, "num_hidden_layers", 0),
    (LLAMA_3_1, "rms_norm_eps", 0, float("nan"), "1e-5"),
    (LLAMA_3_1, "tie_word_embeddings", "yes"),
    (LLAMA_3_1, "eos_token_id", "</s>", 2.5, [128001, None]),
    (LLAMA_3_1, "rope_theta", float("inf"), 0),
    (LLAMA_3_1, "rope_scaling", "linear", [], {"factor": 2.0}, {"type": "linear"}, LINEAR | {"beta_fast": 32}),
    (LLAMA_3_1, "rope_scaling.factor", None, 0, "8"),
    (LLAMA_3_1, "rope_scaling.low_freq_factor", None, True),
    (LLAMA_3_1, "rope_scaling.high_freq_factor", 1.0),  # not above low_freq_factor
    (LLAMA_3_1, "rope_scaling.rope_type", "dynamic", "longrope", None, ["llama3"]),
    (LLAMA_3_1 | {"rope_scaling": None, "rope_parameters": LINEAR}, "rope_parameters.rope_type", "yarn"),
    (LLAMA_3_1, "interpolate_position_ids", True),  # there is no memory to make room for
    (LLAMA_3_1, "partial_rotary_factor", 0.5),
    (LLAMA_3_1, "num_local_experts", 8),
    (MEMORYLLM_7B, "interpolate_position_ids", 1),
    (MEMORYLLM_7B, "max_position_embeddings", 0),
    (MEMORYLLM_7B, "use_negative_position_ids", True),
    (MEMORYLLM_7B, "shrink_to_one_embedding", False),
    (MEMORYLLM_8B, "interpolate_position_ids", True),  # beside rope_scaling
    (MEMORYLLM_8B, "num_blocks", None, 0),
    (MEMORYLLM_8B, "num_tokens", None),
    (MEMORYLLM_8B, "num_memory_tokens", 12801),
    (MEMORYLLM_8B, "add_bos_embedding", 1),
    (MEMORYLLM_8B, "drop_memory_per_layer", "true"),
    (MEMORYLLM_8B, "add_decoder_lora", 0),
    (MEMORYLLM_8B, "lora_config", "r16"),
    (MEMORYLLM_8B, "lora_config.r", None, 0),
    (MEMORYLLM_8B, "lora_config.lora_alpha", None),
    (MEMORYLLM_8B, "lora_config.use_rslora", True),
    (MEMORYLLM_8B, "lora_config.alpha_pattern", {"q_proj": 8}),
    (MEMORYLLM_8B, "lora_config.target_modules", None, [], "all-linear", ["lm_head"], [["q_proj"]]),
]
CASES = [(base, key, value) for base, key, *values in REFUSED for value in values]


@pytest.mark.parametrize(("base", "key", "value"), CASES, ids=[f"{key}={value!r}" for _, key, value in CASES])
def test_refused_by_name(base, key, value):
    ModelConfig.from_dict(base)  # it is the change that is refused
    outer, _, inner = key.partition(".")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: "):
        ModelConfig.from_dict(base | {outer: base[outer] | {inner: value} if inner else value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": LINEAR}, "rope_scaling: expected one of rope_scaling and rope_parameters, got both"),
        ({"rope_scaling": LINEAR | {"rope_theta": 1e4}}, "rope_theta: 500000.0 contradicts rope_scaling.rope_theta"),
        ({"rope_scaling": LINEAR | {"type": "default"}}, "rope_scaling.rope_type: expected one of"),
    ],
)
def test_refused_contradiction(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ModelConfig.from_dict(LLAMA_3_1 | changes)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null"], ids=str)
def test_refused_file(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path / 'config.json'}: ")):
        ModelConfig.from_folder(tmp_path)
