"""The forward of `model.Llama` with gradients and one pool for each of P sequences, on the pure ops of `reference`.

It computes what the engine computes (tests compare the two), slower: memory stays hidden states, whose keys and values
are projected at every read, since the projections are being trained. The dimension key stands in `reference`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernel import reference
from memkernel.config import ModelConfig
from memkernel.weights import expected_shapes

STATE = ("memory", "initialized")  # tensors of a checkpoint that are not trained
EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_LENGTH = 8.0
ADDS = ("o_proj.weight", "down_proj.weight")  # whose outputs are added to the hidden states


def initial_weights(config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float32 parameters under the names of a checkpoint.

    What layers add is small at first beside embeddings, which are large, so that a row still shows its token in the
    last layer.
    """
    weights = {}
    for name, shape in expected_shapes(config).items():
        if name in STATE:
            continue
        weight = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        if name.endswith(ADDS) or name in ("bos_embedding", "new_memory_positional_emb"):
            weight *= 0.1
        weights[name] = torch.ones(shape) if "norm" in name else weight
    weights[EMBEDDING] *= EMBEDDING_LENGTH
    weights["model.norm.weight"] /= EMBEDDING_LENGTH
    return weights


class DifferentiableLlama:
    """The forward for one set of float32 weights, named as in a checkpoint, without adapters.

    Matrices, and what is multiplied by them, are rounded to `dtype`, as are queries, keys and values; the residual
    stream, the memory and the arithmetic of norms and softmax stay float32.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32):
        if config.lora is not None:
            raise ValueError("config: expected a model without adapters, got lora_config")
        self.config, self.weights, self.dtype = config, weights, dtype
        self.matrices = {name: weight.to(dtype) for name, weight in weights.items() if weight.ndim == 2}
        self.embedding = weights[EMBEDDING]
        self.head = "model.embed_tokens" if config.tied_embeddings else "lm_head"
        self.write_embedding = weights["new_memory_positional_emb"][0, 0]
        longest = 2 * config.memory_rows + 8 * config.write_rows
        self.tables = config.rope.table(longest, config.head_size, self.embedding.device)

    def read(self, input_ids: Tensor, pool: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """Logits after each token, or after those that are wanted.

        Args:
            input_ids: [B, T] int64, sequences padded on the right.
            pool: [L, P, M', E] hidden states in age order, pool p serving B / P consecutive sequences; any M' >= 1.
                None is a plain Llama.
            wanted: [B, T] bool.
        Returns: [B, T, V] float32; with `wanted`, [count, V] in the order of its true elements.
        """
        x = F.embedding(input_ids, self.embedding)
        for i in range(self.config.num_layers):
            x = self._layer(i, x, x.shape[1], None if pool is None else pool[i], bos=pool is not None)
        x = x if wanted is None else x[wanted]
        return self._linear(self.head, self._normed("model.norm", x)).float()

    def inject(self, input_ids: Tensor, recent: Tensor | None) -> Tensor:
        """The rows that text writes.

        Args:
            input_ids: [P, T] int64, one text of T tokens for each pool.
            recent: [L, P, W, E], the newest rows of each pool in age order; None for pools that are empty.
        Returns: [L, P, W, E]; min(W, T) rows for empty pools.
        """
        config, T = self.config, input_ids.shape[1]
        W, first = config.write_rows, recent is None
        kept = min(W, T) if first else W
        x = F.embedding(input_ids, self.embedding)
        delta = []
        for i in range(config.num_layers):
            rows = x if first else torch.cat([recent[i], x], dim=1)
            rows = torch.cat([rows[:, :-W], rows[:, -W:] + self.write_embedding], dim=1)
            out = self._layer(i, rows, max(kept, T), None, bos=not first)
            x = out[:, -T:]
            # As published: the first fill stores the next layer's input, embedding included.
            quirk = first and i + 1 < config.num_layers
            delta.append(out[:, -kept:] + self.write_embedding if quirk else out[:, -kept:])
        return torch.stack(delta)

    def _layer(self, index: int, rows: Tensor, queries: int, memory: Tensor | None, bos: bool) -> Tensor:
        """The output of one layer for the last `queries` of rows [B, S, E], over [bos ; memory [P, M', E] ; rows]."""
        name = f"model.layers.{index}."
        M, S, bos = 0 if memory is None else memory.shape[1], rows.shape[1], bos and self.config.has_bos
        normed = self._normed(name + "input_layernorm", rows)
        own_position = torch.arange(bos + M, bos + M + S, device=rows.device)
        source, source_position = normed, own_position
        if bos:
            bos_E = self._normed(name + "input_layernorm", self.weights["bos_embedding"][index, 0])
            source = torch.cat([bos_E.expand(len(rows), 1, -1), normed], dim=1)
            source_position = torch.cat([own_position.new_zeros(1), own_position])
        query = self._rotate(self._project(name + "self_attn.q_proj", normed[:, -queries:]), own_position[-queries:])
        key, value = self._keys_and_values(name, source, source_position)
        memory_key = memory_value = key.new_zeros(1, 0, *key.shape[2:])
        if memory is not None:
            memory = self._normed(name + "input_layernorm", memory)
            position = torch.arange(bos, bos + M, device=rows.device)
            memory_key, memory_value = self._keys_and_values(name, memory, position)
        start = torch.full((len(rows),), source.shape[1] - queries, dtype=torch.int32, device=rows.device)
        attended = reference.memory_attention(query, memory_key, memory_value, key, value, start)
        out = rows[:, -queries:] + self._linear(name + "self_attn.o_proj", attended.flatten(2))
        normed = self._normed(name + "post_attention_layernorm", out)
        gate_up = torch.cat([self._linear(name + f"mlp.{part}_proj", normed) for part in ("gate", "up")], dim=-1)
        return out + self._linear(name + "mlp.down_proj", reference.swiglu(gate_up))

    def _keys_and_values(self, name: str, source: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        key = self._rotate(self._project(name + "self_attn.k_proj", source), position)
        return key, self._project(name + "self_attn.v_proj", source)

    def _normed(self, module: str, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weights[module + ".weight"], self.config.norm_eps).to(self.dtype)

    def _linear(self, module: str, x: Tensor) -> Tensor:
        return reference.linear(x, self.matrices[module + ".weight"])

    def _project(self, module: str, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, heads, D]."""
        return self._linear(module, x).unflatten(-1, (-1, self.config.head_size))

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        return reference._rotate(x, *(table[position].unsqueeze(-2) for table in self.tables))


def filled(delta: Tensor, rows: int) -> Tensor:
    """The pool [L, P, rows, E] that a first block [L, P, R, E] makes: whole copies of it, then its last rows."""
    whole, rest = divmod(rows, delta.shape[2])
    copies = [delta] * whole + ([delta[:, :, -rest:]] if rest else [])
    return torch.cat(copies, dim=2)


def draw_kept(like: Tensor, count: int, generator: torch.Generator, per_layer: bool) -> Tensor:
    """Which ranks of pools like [L, P, M, E] stay when `count` drop: [L, P, M - count], ascending."""
    L, P, M, _ = like.shape
    draws = torch.rand(L if per_layer else 1, P, M, generator=generator).argsort(-1)
    return draws[..., count:].sort(-1).values.expand(L, P, M - count).to(like.device)


def updated(pool: Tensor, delta: Tensor, kept: Tensor) -> Tensor:
    """The pool [L, P, M, E] reduced to the ranks `kept`, with delta [L, P, R, E] appended."""
    return torch.cat([pool.gather(2, kept[..., None].expand(-1, -1, -1, pool.shape[-1])), delta], dim=2)
