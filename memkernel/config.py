"""The model's geometry, read from a checkpoint's config.json.

Two families are understood: MemoryLLM (recognised by its fields `num_blocks` and `num_tokens`, because the published 8B
checkpoints call themselves "llama") and plain Llama. A key that could change the computation in a way that is not
implemented is refused by name; so is a key that is not known at all.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Keys with no influence on inference here: bookkeeping, training, and the output options of Hugging Face classes.
# fmt: off
_IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "is_encoder_decoder",
    "label2id", "max_length", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}
# fmt: on
# Keys whose other values select a computation that is not implemented.
_ONLY = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_negative_position_ids": (False, None),
    "shrink_to_one_embedding": (True, None),  # [1, 1, E] new_memory_positional_emb, the published layout
}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_LORA_IGNORED = {
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "init_lora_weights",
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` is default, linear or llama3; the other fields are its parameters."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 0.0

    def frequencies(self, head_size: int) -> Tensor:
        """Radians per position of each rotated pair: [D/2] float32, CPU."""
        exponent = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        freq = 1.0 / self.theta**exponent
        if self.kind != "llama3":
            return freq
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        turns = self.original_max_position_embeddings * freq / (2 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(freq / self.factor, freq, keep.clamp(0, 1))

    def table(self, length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0..length-1: two [length, D/2] float32 tensors on `device`."""
        position = torch.arange(length).float()
        if self.kind == "linear":  # the positions are divided, as published, not the frequencies
            position = position / self.factor
        angle = position[:, None] * self.frequencies(head_size)[None, :]
        return angle.cos().to(device), angle.sin().to(device)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: y = W x + scale * B (A x) on the projections named in `targets`."""

    rank: int
    scale: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of a Llama and of its memory. Letters in parentheses are the dimension key (see `reference`)."""

    vocab_size: int  # (V)
    hidden_size: int  # (E)
    intermediate_size: int  # (F)
    num_layers: int  # (L)
    num_heads: int  # (H)
    num_kv_heads: int  # (G)
    head_size: int  # (D)
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    memory_rows: int = 0  # (M) 0: a plain Llama, no memory
    write_rows: int = 0  # (W) rows written by one update
    has_bos: bool = False  # a trained first row per layer stands before the memory
    drop_per_layer: bool = False  # an independent draw in each layer
    lora: Lora | None = None
    read_adapter: bool = False  # reading has an adapter of its own, `decoder_adapter`

    @property
    def has_memory(self) -> bool:
        return self.memory_rows > 0

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json. Raises ValueError naming the key that is missing, malformed or not implemented."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: expected a checkpoint folder with a config.json, found none")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:  # JSONDecodeError is one too
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """Build from the parsed config.json. Raises ValueError naming the key."""
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
        keys = Keys(raw)
        model_type = raw.get("model_type", "llama")
        if model_type not in ("llama", "memoryllm"):
            raise ValueError(f"model_type: expected 'llama' or 'memoryllm', got {model_type!r}")
        for key, allowed in _ONLY.items():
            if (value := keys.take(key, allowed[0])) not in allowed:
                raise ValueError(f"{key}: only {allowed[0]!r} is implemented, got {value!r}")

        hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        num_kv_heads = keys.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_key_value_heads: expected a divisor of {num_heads} heads, got {num_kv_heads}")
        if raw.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(f"num_attention_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        head_size = keys.integer("head_dim", hidden_size // num_heads)
        if head_size % 2:
            raise ValueError(f"head_dim: expected an even size to rotate, got {head_size}")
        memory = _memory_fields(keys)
        config = cls(
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=_rope(keys, memory.get("memory_rows", 0), memory.get("write_rows", 0)),
            tied_embeddings=keys.boolean("tie_word_embeddings", False),
            eos_token_ids=keys.token_ids("eos_token_id"),
            **memory,
        )
        if unknown := sorted(set(raw) - keys.taken - _IGNORED):
            raise ValueError(f"{unknown[0]}: not a key that memkernel knows, value {raw[unknown[0]]!r}")
        return config


class Keys:
    """A dictionary remembering which keys were read; `prefix` names the key it is nested under."""

    def __init__(self, raw: dict, prefix: str = ""):
        self.raw, self.prefix, self.taken = raw, prefix, set()

    def take(self, key: str, default):
        self.taken.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.prefix}{key}: expected a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{self.prefix}{key}: expected a positive number, got {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.prefix}{key}: expected true or false, got {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.take(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ValueError(f"{self.prefix}{key}: expected a token id or a list of them, got {value!r}")
        return tuple(ids)


def _memory_fields(keys: Keys) -> dict:
    names = ("num_blocks", "num_tokens")
    given = [name for name in names if keys.raw.get(name) is not None]
    if not given and keys.raw.get("model_type") != "memoryllm":
        return {}
    blocks, write_rows = (keys.integer(name) for name in names)
    rows = blocks * write_rows
    if (stated := keys.integer("num_memory_tokens", rows)) != rows:
        raise ValueError(f"num_memory_tokens: expected num_blocks * num_tokens = {rows}, got {stated}")
    lora = _lora(keys.take("lora_config", None))
    return {
        "memory_rows": rows,
        "write_rows": write_rows,
        "has_bos": keys.boolean("add_bos_embedding", True),
        "drop_per_layer": keys.boolean("drop_memory_per_layer", False),
        "lora": lora,
        "read_adapter": keys.boolean("add_decoder_lora", False) and lora is not None,
    }


def _lora(raw: dict | None) -> Lora | None:
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"lora_config: expected an object, got {raw!r}")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not targets or any(target not in PROJECTIONS for target in targets):
        raise ValueError(f"lora_config.target_modules: expected a list out of {list(PROJECTIONS)}, got {targets!r}")
    for key in set(raw) - {"r", "lora_alpha", "target_modules"} - _LORA_IGNORED:
        if raw[key] not in (None, False, "none", [], {}):
            raise ValueError(f"lora_config.{key}: not implemented, got {raw[key]!r}")
    keys = Keys(raw, "lora_config.")
    rank = keys.integer("r")
    return Lora(rank, keys.number("lora_alpha") / rank, tuple(targets))


def _rope(keys: Keys, memory_rows: int, write_rows: int) -> Rope:
    """Accepts rope_theta + rope_scaling, the newer rope_parameters, and the 7B's interpolate_position_ids."""
    theta = keys.number("rope_theta", 10000.0)
    old, new = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    if old is not None and new is not None:
        raise ValueError("rope_scaling: expected one of rope_scaling and rope_parameters, got both")
    name, scaling = ("rope_parameters", new) if new is not None else ("rope_scaling", old if old is not None else {})
    if not isinstance(scaling, dict):
        raise ValueError(f"{name}: expected an object, got {scaling!r}")
    nested = Keys(scaling, f"{name}.")
    if "rope_theta" in scaling:
        if keys.raw.get("rope_theta") not in (None, scaling["rope_theta"]):
            raise ValueError(f"rope_theta: {theta} contradicts {name}.rope_theta {scaling['rope_theta']}")
        theta = nested.number("rope_theta")
    kinds = [scaling[key] for key in ("rope_type", "type") if key in scaling] or ["default"]
    if kinds[0] != kinds[-1] or not isinstance(kinds[0], str) or kinds[0] not in _ROPE_KEYS:
        raise ValueError(
            f"{name}.rope_type: expected one of {sorted(_ROPE_KEYS)}, got {' and '.join(map(repr, kinds))}"
        )
    kind, parameters = kinds[0], set(scaling) - {"rope_theta", "rope_type", "type"}
    if parameters != _ROPE_KEYS[kind]:
        raise ValueError(f"{name}: type {kind!r} takes {sorted(_ROPE_KEYS[kind])}, got {sorted(parameters)}")
    numbers = {key: nested.number(key) for key in parameters}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise ValueError(f"{name}.high_freq_factor: expected more than low_freq_factor, got {scaling}")

    trained = keys.integer("max_position_embeddings", 2048)
    if not keys.boolean("interpolate_position_ids", False):
        return Rope(theta, kind, **numbers)
    if kind != "default" or not memory_rows:
        raise ValueError("interpolate_position_ids: expected a memory and no rope scaling beside it")
    # MemoryLLM-7B: positions are squeezed so that the memory and one more block fit into the trained range.
    return Rope(theta, "linear", max(memory_rows + write_rows, trained) / trained)
