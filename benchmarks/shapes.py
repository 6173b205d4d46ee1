"""What is measured: model shapes, random weights made on the device, and the least work of each workload.

The dimension key stands in `memkernel.reference`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import memkernel.ops
from memkernel import huge_pages, tiny
from memkernel.config import ModelConfig
from memkernel.memory import Delta, Memory
from memkernel.model import Layer, Linear, Llama
from memkernel.weights import expected_shapes

ADAPTERS = {
    "add_decoder_lora": True,
    "lora_config": {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "linear", "factor": 1.8125},
    "num_blocks": 50,
    "num_tokens": 256,
    "add_bos_embedding": True,
    "drop_memory_per_layer": True,
}
SHAPES = {
    "tiny": {k: v for k, v in tiny.MEMORYLLM.items() if not k.endswith("_token_id")} | ADAPTERS,
    # Four of the sixteen layers of Llama-3.2-1B, with a vocabulary in proportion.
    "1b": LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 32000},
    "8b": LLAMA_8B | ADAPTERS,  # MemoryLLM-8B, with the two adapters that it ships
}
# Spread of the weights, times 1 / sqrt(columns). Attention logits get a standard deviation of 2 and the attended rows
# weigh as much as the residual stream: with the usual 0.02 attention is an average of everything, and a kernel that
# lost half the memory would pass every check.
SPREAD = {"q_proj": 2.0, "o_proj": 8.0, "default": 0.3, "decoder_adapter": 0.3}


def random_model(raw: dict, dtype: torch.dtype, device: torch.device) -> tuple[Llama, dict[str, Tensor]]:
    """A model with random weights, and the same weights under the names of the published layout.

    Where there are no adapters the two share storage.
    """
    config = ModelConfig.from_dict(raw)
    generator = torch.Generator(device).manual_seed(0)
    shapes = expected_shapes(config)
    tensors: dict[str, Tensor] = {"initialized": torch.tensor(1, dtype=torch.uint8)}

    def random(name: str, out: Tensor | None = None) -> Tensor:
        shape = shapes[name]
        out = huge_pages.empty(shape, dtype, device) if out is None else out
        module = name.removesuffix(".weight").removesuffix(".base_layer").rsplit(".", 1)[-1]
        is_projection = len(shape) == 2 and module != "embed_tokens"
        std = SPREAD.get(module, 1.0) * shape[-1] ** -0.5 if is_projection else 0.3
        tensors[name] = out.normal_(std=std, generator=generator)
        if "norm" in name:
            out.add_(1)
        return out

    def linear(*modules: str) -> Linear:
        plain = [f"{module}.weight" in shapes for module in modules]
        names = [f"{m}.weight" if p else f"{m}.base_layer.weight" for m, p in zip(modules, plain, strict=True)]
        rows = [shapes[name][0] for name in names]
        weight = huge_pages.empty((sum(rows), shapes[names[0]][1]), dtype, device)
        downs, ups = [], []
        for module, name, part in zip(modules, names, weight.split(rows), strict=True):
            if name.endswith("base_layer.weight"):
                A_read, B_read = (random(f"{module}.lora_{x}.decoder_adapter.weight") for x in "AB")
                A_write, B_write = (random(f"{module}.lora_{x}.default.weight") for x in "AB")
                part.copy_(random(name)).addmm_(B_read, A_read, alpha=config.lora.scale)
                downs.append(torch.cat([A_write, A_read]))
                ups.append(config.lora.scale * torch.cat([B_write, -B_read], dim=1))
            else:
                random(name, out=part)
                ups.append(weight.new_zeros(len(part), 0))
        return Linear(weight, torch.cat(downs), torch.block_diag(*ups)) if downs else Linear(weight)

    layers = []
    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        layers.append(
            Layer(
                input_norm=random(f"model.layers.{i}.input_layernorm.weight"),
                qkv=linear(*(attention + part for part in ("q_proj", "k_proj", "v_proj"))),
                o=linear(attention + "o_proj"),
                post_norm=random(f"model.layers.{i}.post_attention_layernorm.weight"),
                gate_up=linear(mlp + "gate_proj", mlp + "up_proj"),
                down=linear(mlp + "down_proj"),
            )
        )
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "bos_embedding")
    embedding, norm, head, bos = map(random, names)
    write_embedding = random("new_memory_positional_emb")[0, 0]
    random("memory")
    model = Llama(config, embedding, layers, norm, head, bos[:, 0], write_embedding, memkernel.ops)
    return model, tensors


def projected(model: Llama, hidden: Tensor) -> list[Tensor]:
    """The un-rotated keys and values [L, M, G, D] of a pool of hidden states [L, M, E]."""
    rows = [model.project(i, layer) for i, layer in enumerate(hidden)]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def filled_memory(model: Llama, hidden: Tensor) -> Memory:
    """A memory that holds the rows of `hidden` [L, M, E], oldest first."""
    memory = Memory(model.config, "benchmark", model.ops, hidden.dtype, hidden.device)
    memory.write(Delta(*projected(model, hidden), hidden))
    return memory


@dataclass(frozen=True)
class Work:
    """The least that a workload must do: bytes to and from memory, each once, and floating-point operations."""

    read: float = 0.0
    written: float = 0.0
    flop: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.written + other.written, self.flop + other.flop)

    def times(self, n: float) -> "Work":
        return Work(self.read * n, self.written * n, self.flop * n)


class Least:
    """The `Work` of each workload for one model: what the mathematics needs, whoever does it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self.config, self.size = config, dtype.itemsize
        E, D, F = config.hidden_size, config.head_size, config.intermediate_size
        self.queries = E * config.num_heads * D  # weights of the q projection, of o too
        self.keys_values = 2 * E * config.num_kv_heads * D
        self.mlp = 3 * E * F
        self.row = 2 * config.num_kv_heads * D * self.size  # bytes of a row's key and value in one layer

    def weights(self) -> Work:
        """Every layer's weights, read once."""
        return Work(read=self.config.num_layers * (2 * self.queries + self.keys_values + self.mlp) * self.size)

    def head(self, rows: int) -> Work:
        """Logits of `rows` rows."""
        weights = self.config.vocab_size * self.config.hidden_size
        return Work(weights * self.size, rows * self.config.vocab_size * 4, 2 * rows * weights)

    def attention(self, T: int, memory_rows: int, past: int = 0, sequences: int = 1) -> Work:
        """One layer: T queries a sequence over one memory, `past` own rows and themselves, causally."""
        config = self.config
        seen = T * (memory_rows + past) + T * (T + 1) / 2
        own = sequences * (past + T) * self.row
        query_bytes = sequences * T * config.num_heads * config.head_size * self.size
        flop = 4 * sequences * seen * config.num_heads * config.head_size
        return Work(memory_rows * self.row + own + query_bytes, query_bytes, flop)

    def read(self, T: int, past: int = 1, sequences: int = 1) -> Work:
        """T more tokens of each sequence through every layer over one memory, and logits of the last of each."""
        L, M = self.config.num_layers, self.config.memory_rows
        flop = 2 * sequences * T * L * (2 * self.queries + self.keys_values + self.mlp)
        attention = self.attention(T, M, past, sequences).times(L)
        return self.weights() + attention + self.head(sequences) + Work(flop=flop)

    def inject(self, T: int) -> Work:
        """One chunk of T tokens: rows [bos ; W newest ; text]; of the last layer only the W rows that are kept."""
        config, W = self.config, self.config.write_rows
        outputs = max(T, W) * (config.num_layers - 1) + W
        keys = (1 + W + T) * config.num_layers
        linear = 2 * (outputs * (2 * self.queries + self.mlp) + keys * self.keys_values)
        seen = (config.num_layers - 1) * _causal(max(T, W), 1 + W + T) + _causal(W, 1 + W + T)
        attention = 4 * seen * config.num_heads * config.head_size
        projection = 2 * config.num_layers * W * self.keys_values
        return self.weights() + Work(flop=linear + attention + projection)

    def write(self, memory_rows: int) -> Work:
        """W new rows into every layer's pool, and every row's rank read and written."""
        L, moved = self.config.num_layers, self.config.write_rows * self.row
        return Work(L * (moved + 4 * memory_rows), L * (moved + 4 * memory_rows))


def _causal(queries: int, rows: int) -> float:
    """Pairs of (query, row seen) where the queries are the last of the rows."""
    return queries * (rows - queries) + queries * (queries + 1) / 2
