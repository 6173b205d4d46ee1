"""Other people's code doing the same work, each in the configuration that is best for it.

The published data flow has a file of its own, `published.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from memkernel import huge_pages
from memkernel.engine import Engine

CACHES = ("StaticCache", "DynamicCache")


class HuggingFace:
    """transformers' Llama on the engine's weights, with bos and the projected, rotated memory as a prefilled cache."""

    def __init__(self, raw: dict, engine: Engine):
        self.engine, config = engine, engine.config
        self.quicker_cache: dict = {}  # by kind of case
        model = engine.model
        rope = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
        if scaling := raw.get("rope_scaling"):
            rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
        llama = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            max_position_embeddings=1 << 17,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(llama).eval()
        self.model.load_state_dict(_state_dict(model), strict=True, assign=True)
        self.model.model.rotary_emb = LlamaRotaryEmbedding(llama).to(model.embedding.device)

    def memory_rows(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the keys and values [1, G, 1 + M, D] of bos and memory, in age order."""
        model, memory = self.engine.model, self.engine.memory
        model.new_cache(1, 1, memory)  # brings the rotated keys up to date
        rows = []
        for i, slots in enumerate(memory.rank.long().argsort(1)):
            key = torch.cat([model.bos_key[i, None], memory.rotated_key[i][slots]])
            value = torch.cat([model.bos_value[i, None], memory.value[i][slots]])
            rows.append(tuple(x.transpose(0, 1)[None].contiguous() for x in (key, value)))
        return rows

    def cache(self, kind: str, batch: int, room: int, prompt: Tensor | None) -> "DynamicCache | StaticCache":
        """A cache that holds bos, the memory and `prompt` [1, T] for each of `batch` sequences. DynamicCache grows by
        concatenation and needs no mask to decode; StaticCache has `room` more rows, is written in place, and masks
        those that are not filled yet."""
        one = DynamicCache()
        for i, (key, value) in enumerate(self.memory_rows()):
            one.update(key, value, i)
        if prompt is not None:
            self.forward(prompt, one)
        filled = one.get_seq_length()
        cache = DynamicCache() if kind == "DynamicCache" else StaticCache(self.model.config, filled + room)
        for i, layer in enumerate(one.layers):
            cache.update(*(rows.repeat(batch, 1, 1, 1) for rows in (layer.keys, layer.values)), i)
        return cache

    def forward(self, input_ids: Tensor, cache) -> Tensor:
        """[B, T] ids after what the cache holds -> the last token's logits [B, 1, V]."""
        return self.model(input_ids, past_key_values=cache, logits_to_keep=1, use_cache=True).logits


def rewinder(cache: "DynamicCache | StaticCache") -> Callable[[], None]:
    """What brings a cache back to the state that it has now."""
    if isinstance(cache, StaticCache):
        filled = int(cache.get_seq_length())
        return lambda: [layer.cumulative_length.fill_(filled) for layer in cache.layers]
    state = [(layer, layer.keys, layer.values) for layer in cache.layers]

    def rewind() -> None:
        for layer, keys, values in state:
            layer.keys, layer.values = keys, values

    return rewind


def _state_dict(model) -> dict[str, Tensor]:
    """The fused weights under transformers' names, sharing storage."""
    config, state = model.config, {}
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv.weight.split([queries, keys, keys])
        gate, up = layer.gate_up.weight.chunk(2)
        names = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o.weight,
        }
        names |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down.weight}
        names |= {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in names.items()}
    tops = {"model.embed_tokens": model.embedding, "model.norm": model.norm, "lm_head": model.head}
    return state | {f"{name}.weight": tensor for name, tensor in tops.items()}


@dataclass
class AttentionInputs:
    """One layer's call of `memkernel.reference.memory_attention` with one pool; row 0 of each sequence is the same."""

    query: Tensor  # [B, T, H, D]
    memory_key: Tensor  # [1, M, G, D]
    memory_value: Tensor
    key: Tensor  # [B, S, G, D]; rows from seen on are not to be seen by any query
    value: Tensor
    start: Tensor  # [B] int32, the same for all

    @property
    def seen(self) -> int:
        return int(self.start[0]) + self.query.shape[1]

    def own(self, skip: int) -> list[Tensor]:
        """Own keys and values [B, G, seen - skip, D]."""
        return [x[:, skip : self.seen].transpose(1, 2) for x in (self.key, self.value)]

    def concatenated(self) -> list[Tensor]:
        """Keys and values [B, G, M + seen, D], memory first."""
        B, pools = len(self.query), (self.memory_key, self.memory_value)
        pools = [x.expand(B, -1, -1, -1).transpose(1, 2) for x in pools]
        return [side_by_side(parts) for parts in zip(pools, self.own(0), strict=True)]

    def visible(self) -> Tensor | None:
        """[T, M + seen] bool, or None where every query sees everything."""
        T, columns = self.query.shape[1], self.memory_key.shape[1] + self.seen
        return torch.ones(T, columns, device=self.query.device).tril(columns - T).bool() if T > 1 else None


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Rows [B, G, *, D] one after the other, in pages like the pool's."""
    rows = torch.cat(parts, dim=2)
    return huge_pages.copy(rows, rows.device)


def sdpa(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """One call over rows that already lie side by side, heads not expanded, and a mask where T > 1."""
    key, value = inputs.concatenated()
    mask = inputs.visible()

    def call():
        query = inputs.query.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return call


def sdpa_merged(inputs: AttentionInputs, kernel: Callable) -> Callable[[], Tensor]:
    """Two calls without a mask, merged by their log-sum-exp: the queries of all sequences over [memory ; row 0], packed
    into one tall product per key/value head, and each sequence over its other rows."""
    B, T, H, D = inputs.query.shape
    G = inputs.key.shape[2]
    row_0 = [x[:1, :, :1] for x in inputs.own(0)]
    pools = [x.transpose(1, 2) for x in (inputs.memory_key, inputs.memory_value)]
    key, value = (side_by_side(parts) for parts in zip(pools, row_0, strict=True))
    own_key, own_value = (x.repeat_interleave(H // G, dim=1).contiguous() for x in inputs.own(1))

    def call():
        packed = inputs.query.unflatten(2, (G, H // G)).permute(2, 0, 1, 3, 4).reshape(1, G, B * T * H // G, D)
        shared, shared_lse = kernel(packed, key, value, is_causal=False)
        shared = shared.reshape(G, B, T, H // G, D).permute(1, 2, 0, 3, 4).reshape(B, T, H, D)
        shared_lse = shared_lse.reshape(G, B, T, H // G).permute(1, 2, 0, 3).reshape(B, T, H)
        own, own_lse = kernel(inputs.query.transpose(1, 2), own_key, own_value, is_causal=T > 1)
        weight = torch.sigmoid(shared_lse - own_lse.transpose(1, 2)).unsqueeze(-1)
        return torch.lerp(own.transpose(1, 2).float(), shared.float(), weight).to(shared.dtype)

    return call


def flash_cpu(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal)


def flash_cuda(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=is_causal)[:2]


def cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, compute_log_sumexp=True, is_causal=is_causal
    )[:2]
    return out, lse.reshape(out.shape[:-1])


def flex(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """FlexAttention, compiled, over rows that already lie side by side."""
    key, value = inputs.concatenated()
    T, columns = inputs.query.shape[1], key.shape[2]
    mask = None
    if T > 1:
        mask = create_block_mask(
            lambda b, h, row, column: column <= row + (columns - T), None, None, T, columns, device=key.device
        )
    compiled = _compiled_flex()
    return lambda: compiled(inputs.query.transpose(1, 2), key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)
