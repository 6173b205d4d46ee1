"""A slim Llama that reads a memory and writes to it: no framework classes, one screen per forward.

Reading (spec: MemoryLLM, arXiv 2402.04624, section 3.1.2): every layer's queries are the text; its keys and values are
the trained bos row, the M memory rows and the text. The memory's keys and values are projected once, when a row is
written, and never again. Writing (section 3.1.1): one pass over [bos ; newest W memory rows ; text] whose last W output
rows of every layer become that layer's new memory rows.

The dimension key stands in `reference`.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memkernel.config import ModelConfig
from memkernel.memory import Delta, Memory


@dataclass
class Linear:
    """A projection as readers apply it, and what writers add: y + up (down x), a product of rank R.

    Reading and writing may have different low-rank adapters. The reader's is merged into `weight`; the correction is
    down = [A_write ; A_read], up = scale * [B_write, -B_read], block-diagonal over the parts of a fused projection.
    """

    weight: Tensor  # [out, in]
    down: Tensor | None = None  # [R, in]
    up: Tensor | None = None  # [out, R]

    def read(self, x: Tensor, ops) -> Tensor:
        return ops.linear(x, self.weight)

    def write(self, x: Tensor, ops) -> Tensor:
        y = ops.linear(x, self.weight)
        return y if self.down is None else y + ops.linear(ops.linear(x, self.down), self.up)

    def rows(self, begin: int, end: int) -> "Linear":
        """The projection onto outputs begin..end-1, sharing storage."""
        up = None if self.up is None else self.up[begin:end]
        return Linear(self.weight[begin:end], self.down, up)


@dataclass
class Layer:
    input_norm: Tensor  # [E]
    qkv: Linear  # [(H + 2 G) D, E]
    o: Linear  # [E, H D]
    post_norm: Tensor  # [E]
    gate_up: Linear  # [2 F, E]
    down: Linear  # [E, F]


class SequenceCache:
    """Rotated keys and the values of B sequences' own rows, preallocated; row 0 is bos where the model has one.

    `start` [B] int32 counts the rows of each sequence and stays on the device; `used` bounds it on the host.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor):
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_size)
        self.key, self.value = like.new_zeros(shape), like.new_zeros(shape)  # unseen rows must be finite
        self.start = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self.used = 0

    def advance(self, lengths: Tensor, longest: int) -> None:
        """Count `lengths` [B] more rows as filled, at most `longest` each."""
        self.start += lengths
        self.used += longest

    def first(self, batch: int) -> "SequenceCache":
        """The first `batch` sequences, sharing storage; `used` is counted apart."""
        part = copy.copy(self)
        part.key, part.value, part.start = self.key[:, :batch], self.value[:, :batch], self.start[:batch]
        return part


class Llama:
    """The weights and the two forwards. `ops` is a namespace with the functions of `reference`."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,  # [V, E]
        layers: list[Layer],
        norm: Tensor,  # [E]
        head: Tensor,  # [V, E]
        bos: Tensor | None,  # [L, E], the row before the memory
        write_embedding: Tensor | None,  # [E], added to the rows that become memory
        ops,
    ):
        self.config, self.embedding, self.layers, self.norm, self.head = config, embedding, layers, norm, head
        self.bos, self.write_embedding, self.ops = bos, write_embedding, ops
        self.tables = [config.rope.table(0, config.head_size, embedding.device)]  # cos and sin, the longest last
        self.no_memory = embedding.new_zeros(1, 0, config.num_kv_heads, config.head_size)
        if bos is not None:  # constant for a reader: [L, G, D], at position 0, where rotation is the identity
            projected = [self.project(i, bos[i]) for i in range(len(layers))]
            self.bos_key, self.bos_value = (torch.stack(rows) for rows in zip(*projected, strict=True))

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, input_ids: Tensor, cache: SequenceCache, memory: Memory | None, whole_cache: bool = False) -> Tensor:
        """Run T more tokens of each sequence; their keys and values are appended to `cache`, which is not advanced.

        Args:
            input_ids: [B, T] int64, sequences padded on the right.
            cache: from `new_cache` with the same memory.
            whole_cache: hand the ops all of the cache's rows, not only those in use: shapes that are the same for
                every step, as a captured graph needs, where an op's cost does not depend on rows that nobody sees.
        Returns: [B, T, E] after the final norm, in the model's dtype.
        """
        config, ops, eps = self.config, self.ops, self.config.norm_eps
        offset = config.memory_rows if memory else 0
        seen = cache.key.shape[2] if whole_cache else cache.used + input_ids.shape[1]
        cos, sin = self._rotations(offset + seen)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        # All layers' views at once: on a CPU nothing computes while Python makes them.
        own_rows = zip(cache.key[:, :, :seen].unbind(), cache.value[:, :, :seen].unbind(), strict=True)
        x = F.embedding(input_ids, self.embedding)
        h = ops.rms_norm(x, self.layers[0].input_norm, eps)
        for i, (layer, own, shared) in enumerate(zip(self.layers, own_rows, self._memory_rows(memory), strict=True)):
            q, k, v = self._heads(layer.qkv.read(h, ops)).split_with_sizes(sizes, dim=2)
            q = ops.rope_write_(*own, q, k, v, cos, sin, cache.start, offset)
            attended = ops.memory_attention(q, *shared, *own, cache.start)
            h = ops.add_rms_norm_(x, layer.o.read(attended.flatten(2), ops), layer.post_norm, eps)
            mlp = layer.down.read(ops.swiglu(layer.gate_up.read(h, ops)), ops)
            following = self.layers[i + 1].input_norm if i + 1 < len(self.layers) else self.norm
            h = ops.add_rms_norm_(x, mlp, following, eps)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] after the final norm -> [..., V] float32."""
        return self.ops.linear(hidden, self.head).float()

    def new_cache(self, batch: int, capacity: int, memory: Memory | None) -> SequenceCache:
        """A cache for `capacity` text rows of `batch` sequences, bos in place if the memory is read."""
        cache = SequenceCache(self.config, batch, self._bos_rows(memory) + capacity, self.embedding)
        self.begin(cache, memory)
        return cache

    def begin(self, cache: SequenceCache, memory: Memory | None) -> None:
        """Empty a cache, put bos in place if the memory is read, and bring the memory's rotated keys up to date."""
        bos_rows = self._bos_rows(memory)
        cache.key[:, :, : cache.used], cache.value[:, :, : cache.used] = 0, 0  # what is left there may be NaN
        cache.start.fill_(bos_rows)
        cache.used = bos_rows
        if bos_rows:
            cache.key[:, :, 0], cache.value[:, :, 0] = self.bos_key[:, None], self.bos_value[:, None]
        if memory:
            memory.refresh(*self._rotations(bos_rows + self.config.memory_rows), offset=bos_rows)

    def project(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden rows [..., E] of layer `index` -> the un-rotated keys and values [..., G, D] that readers see."""
        layer, split = self.layers[index], self.config.num_heads * self.config.head_size
        normed = self.ops.rms_norm(hidden, layer.input_norm, self.config.norm_eps)
        rows = self._heads(self.ops.linear(normed, layer.qkv.weight[split:]))
        return rows[..., : self.config.num_kv_heads, :], rows[..., self.config.num_kv_heads :, :]

    # -- writing ------------------------------------------------------------------------------------------------------

    def inject(self, input_ids: Tensor, memory: Memory, out: Delta | None = None) -> Delta:
        """The rows that T tokens of text write: one forward over [bos ; newest W rows ; text], which reads no more.

        Args: input_ids [T] int64, T >= 1. The memory is only read. `out`: where to write the rows.
        Returns: W rows a layer; min(W, T) if the memory is not initialized.
        """
        config = self.config
        T, W = len(input_ids), config.write_rows
        old = W if memory.initialized else 0
        bos_rows = self._bos_rows(memory if memory.initialized else None)
        kept = W if memory.initialized else min(W, T)
        x = F.embedding(input_ids, self.embedding)[None]  # [1, T, E]
        out = Delta.empty(config, kept, self.embedding) if out is None else out
        for i, layer in enumerate(self.layers):
            rows = torch.cat([memory.recent[i][None], x], dim=1) if old else x
            rows[:, -W:] += self.write_embedding
            last = i + 1 == len(self.layers)
            # A short text re-emits old rows; of the last layer only the rows that are kept are computed.
            rows = self._write_layer(layer, i, rows, kept if last else max(kept, T), bos_rows)
            x = rows[:, -T:]
            delta = rows[0, -kept:]
            if not memory.initialized and not last:
                delta = delta + self.write_embedding  # as published: the first fill stores the next layer's input
            out.hidden[i] = delta
            out.key[i], out.value[i] = self.project(i, delta)
        return out

    def _write_layer(self, layer: Layer, index: int, rows: Tensor, queries: int, bos_rows: int) -> Tensor:
        """One layer over rows [1, S, E]; returns its output for the last `queries` rows, [1, queries, E]."""
        config, ops, eps = self.config, self.ops, self.config.norm_eps
        split, S = config.num_heads * config.head_size, rows.shape[1]
        normed = ops.rms_norm(rows, layer.input_norm, eps)
        if bos_rows:
            normed = torch.cat([ops.rms_norm(self.bos[index], layer.input_norm, eps)[None, None], normed], dim=1)
        # Without the batch: PyTorch multiplies a 3-d slice as a batch of products, for which it copies the weight.
        q = self._heads(layer.qkv.rows(0, split).write(normed[0, -queries:], ops))[None]
        k, v = self._heads(layer.qkv.rows(split, None).write(normed, ops)).chunk(2, dim=2)
        key, value = torch.empty_like(k), torch.empty_like(v)
        start = torch.zeros(1, dtype=torch.int32, device=rows.device)
        q = ops.rope_write_(key, value, q, k, v, *self._rotations(bos_rows + S), start, 0)
        nothing = self.no_memory
        attended = ops.memory_attention(q, nothing, nothing, key, value, start + (bos_rows + S - queries))
        out = rows[:, -queries:]
        h = ops.add_rms_norm_(out, layer.o.write(attended.flatten(2), ops), layer.post_norm, eps)
        return out.add_(layer.down.write(ops.swiglu(layer.gate_up.write(h, ops)), ops))

    # -- shared -------------------------------------------------------------------------------------------------------

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.config.head_size)

    def _bos_rows(self, memory: Memory | None) -> int:
        return int(memory is not None and self.config.has_bos)

    def _memory_rows(self, memory: Memory | None) -> Iterable[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, [1, M, G, D]."""
        if memory is None:
            return [(self.no_memory, self.no_memory)] * len(self.layers)
        return zip(memory.rotated_key[:, None].unbind(), memory.value[:, None].unbind(), strict=True)

    def _rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least `length` positions; the table doubles when a longer one is asked for. Outgrown ones
        are kept: captured graphs hold their addresses."""
        if length > len(self.tables[-1][0]):
            longer = max(length, 2 * len(self.tables[-1][0]))
            self.tables.append(self.config.rope.table(longer, self.config.head_size, self.embedding.device))
        return self.tables[-1]
