"""The published data flow in plain PyTorch: an oracle for the tests and the rival of the benchmarks.

What the published implementation of MemoryLLM computes, and how, its waste included: beating it is worth a number only
if this copy is neither faster nor slower than the original. The pool is kept as hidden states; for every prompt it is
copied, normed and projected again; heads are expanded, and every step concatenates the cache anew. An update gathers
the kept rows, concatenates the new ones and copies the pool back; an injection fills a cache and computes logits that
nobody reads. The modules nest as the original's because their calls, and its walk over all of them, cost time too.
Written from the semantics, independent of `memkernel`'s model and ops; its agreement with the published numbers is
tested.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Cache = list[list[Tensor]]  # per layer the rotated keys and the values, [B, G, S, D] each


class Published(nn.Module):
    """The model and its pool `memory` [L, N, d], from tensors by their names in the published layout.

    Shares the storage of `tensors`: updates of an initialized memory are written there, if dropped per layer. As in the
    original, reading records no autograd graph, and writing does unless called under `torch.no_grad()`: the published
    README does not, its evaluation scripts do.
    """

    def __init__(self, config: dict, tensors: dict[str, Tensor]):
        super().__init__()
        self.config, self.K, self.L = config, config["num_tokens"], config["num_hidden_layers"]
        self.has_bos = config.get("add_bos_embedding", True)
        d, V, device = config["hidden_size"], config["vocab_size"], tensors["memory"].device
        with torch.device("meta"):
            self.memory = nn.Parameter(torch.empty(tensors["memory"].shape), requires_grad=False)
            self.new_memory_positional_emb = nn.Parameter(torch.empty(1, 1, d))
            if self.has_bos:
                self.bos_embedding = nn.Parameter(torch.empty(self.L, 1, d))
            self.register_buffer("initialized", torch.zeros((), dtype=torch.uint8))
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(V, d)
            self.model.layers = nn.ModuleList(Layer(config, device) for _ in range(self.L))
            self.model.norm = Norm(config)
            self.lm_head = nn.Linear(d, V, bias=False)
        self.model.requires_grad_(not config.get("lora_config"))  # beside adapters the base is frozen
        self.load_state_dict({name: t.detach() for name, t in tensors.items()}, assign=True)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Published":
        tensors = load_file(Path(folder) / "model.safetensors", device=device)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        return cls(json.loads((Path(folder) / "config.json").read_text()), tensors)

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V] float32, every row of the pool projected anew."""
        return self.prefill(input_ids)[0]

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Cache]:
        """[B, T], sequences of equal length -> the logits of all positions [B, T, V] float32, and the cache."""
        cache = []
        return self(input_ids, cache)[0], cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """[B, 1] -> [B, 1, V] float32. The tensors in `cache` are replaced."""
        return self(token, cache)[0], cache

    def inject(self, input_ids: Tensor) -> Tensor:
        """[T] -> the new rows [L, K', d]."""
        return self(input_ids[None], [], injection=True)[1].detach()[0]

    def update(self, input_ids: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Inject [T] ids and rewrite the pool; `dropped` [L, K] are the indices to drop. Returns the new rows."""
        delta = self.inject(input_ids)
        self.write(delta, dropped)
        return delta

    def write(self, delta: Tensor, dropped: Tensor | None = None) -> None:
        """Fill the pool with the new rows [L, K', d], or drop as many and append them."""
        N, K = self.memory.shape[1], delta.shape[1]
        if not self.initialized:
            tail = delta[:, K - N % K :] if N % K else delta[:, :0]
            self.memory.data = torch.cat([delta] * (N // K) + [tail], dim=1) if K < N else delta[:, -N:]
            self.initialized = torch.ones_like(self.initialized)
        elif self.config.get("drop_memory_per_layer"):
            for i in range(self.L):
                kept = _draw(N, K) if dropped is None else _complement(N, dropped[i])
                self.memory.data[i] = torch.cat([self.memory.data[i][kept], delta[i]])
        else:
            kept = _draw(N, K) if dropped is None else _complement(N, dropped[0])
            self.memory.data = torch.cat([self.memory.data[:, kept], delta], dim=1)

    def forward(self, input_ids: Tensor, cache: Cache, injection: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, T] -> the logits [B, T, V] float32, and of an injection the new rows [B, L, K', d]."""
        hidden, T = self.model.embed_tokens(input_ids), input_ids.shape[1]
        begin, extra, delta = (cache[0][0].shape[2] if cache else 0), 0, []
        if self.initialized and not begin:
            extra = self.has_bos + (self.K if injection else self.memory.shape[1])
        position = torch.arange(begin, begin + extra + T, device=hidden.device)[None]
        if self.config.get("add_decoder_lora"):
            for _, module in self.named_modules():
                if hasattr(module, "_active_adapter"):
                    module._active_adapter = ["default" if injection else "decoder_adapter"]
        for i, layer in enumerate(self.model.layers):
            prefix = 0  # rows that are not queries
            if not begin:
                hidden = self._with_prefix(i, hidden, injection)
                if self.initialized:
                    prefix = hidden.shape[1] - max(T, self.K if injection else 0)
                if injection:
                    # Without a prefix `hidden` is a view of the rows in `delta`, and this changes them too.
                    hidden[:, -self.K :] += self.new_memory_positional_emb
            out = layer(hidden, position, prefix, cache, i)
            if injection:
                delta.append(out[:, -self.K :])
            hidden = out[:, -T:]
        logits = self.lm_head(self.model.norm(hidden)).float()
        return logits, torch.stack(delta).transpose(0, 1) if injection else None

    def _with_prefix(self, i: int, hidden: Tensor, injection: bool) -> Tensor:
        if not self.initialized:
            return hidden
        rows = self.memory[i][-self.K :] if injection else self.memory[i]
        prefix = rows[None].repeat(len(hidden), 1, 1)  # a copy for every sequence, one to add bos, one to add the text
        if self.has_bos:
            prefix = torch.cat([self.bos_embedding[i][None].repeat(len(prefix), 1, 1), prefix], dim=1)
        return torch.cat([prefix, hidden], dim=1)


class Layer(nn.Module):
    def __init__(self, config: dict, device: torch.device):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, device), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = Norm(config), Norm(config)

    def forward(self, rows: Tensor, position: Tensor, prefix: int, cache: Cache, i: int) -> Tensor:
        x = rows[:, prefix:] + self.self_attn(self.input_layernorm(rows), position, prefix, cache, i)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config: dict, device: torch.device):
        super().__init__()
        d, H, G = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        self.head_size, self.copies = d // H, H // G
        self.q_proj, self.o_proj = _linear(config, "q_proj", d, d), _linear(config, "o_proj", d, d)
        self.k_proj, self.v_proj = (_linear(config, f"{part}_proj", d, G * self.head_size) for part in "kv")
        self.rotary_emb = Rotary(config, self.head_size, device)

    def forward(self, x: Tensor, position: Tensor, prefix: int, cache: Cache, i: int) -> Tensor:
        """Normed rows [B, S, d]; those after the first `prefix` are queries. Keys and values join the cache."""
        rows = (self.q_proj(x[:, prefix:]), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in rows)
        cos, sin = self.rotary_emb(position, x.dtype)
        q, k = _rotate(q, cos[:, :, prefix:], sin[:, :, prefix:]), _rotate(k, cos, sin)
        if i < len(cache):
            cache[i] = [torch.cat(pair, dim=2) for pair in zip(cache[i], (k, v), strict=True)]
        else:
            cache.append([k, v])
        k, v = (_expand(part, self.copies) for part in cache[i])
        T, mask = q.shape[2], None
        if prefix:  # made on the host, in every layer
            mask = [torch.ones(T, prefix, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()]
            mask = torch.cat(mask, dim=1).to(q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not prefix and T > 1)
        return self.o_proj(out.transpose(1, 2).contiguous().flatten(2))


class MLP(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        d, f = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj = _linear(config, "gate_proj", d, f), _linear(config, "up_proj", d, f)
        self.down_proj, self.act_fn = _linear(config, "down_proj", f, d), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(config["hidden_size"])), config["rms_norm_eps"]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    def __init__(self, config: dict, head_size: int, device: torch.device):
        super().__init__()
        scaling = config.get("rope_scaling") or {"type": "linear", "factor": 1.0}
        assert scaling["type"] == "linear", "only what published MemoryLLM checkpoints use"
        half = torch.arange(0, head_size, 2, device=device).float()
        self.factor, self.inverse = scaling["factor"], 1.0 / config["rope_theta"] ** (half / head_size)

    @torch.no_grad()
    def forward(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[1, S] -> cos and sin [1, 1, S, D], anew in every layer."""
        with torch.autocast(position.device.type, enabled=False):
            angle = (position.float() / self.factor)[..., None] * self.inverse
            angle = torch.cat([angle, angle], dim=-1)[:, None]
            return angle.cos().to(dtype), angle.sin().to(dtype)


class Adapted(nn.Module):
    """y = W x + scale B A x with the adapter in use, three products."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, names: list[str]):
        super().__init__()
        self.base_layer, self.scale, self._active_adapter = base, scale, names[:1]
        self.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in names})
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=False) for name in names})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()  # empty, but walked over

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for name in self._active_adapter:
            down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            y = y + up(down(dropout(x.to(down.weight.dtype)))) * self.scale
        return y


def _linear(config: dict, name: str, inputs: int, outputs: int) -> nn.Module:
    linear, lora = nn.Linear(inputs, outputs, bias=False), config.get("lora_config")
    if not lora or name not in lora["target_modules"]:
        return linear
    names = ["default", "decoder_adapter"] if config.get("add_decoder_lora") else ["default"]
    return Adapted(linear, lora["r"], lora["lora_alpha"] / lora["r"], names)


def _expand(x: Tensor, copies: int) -> Tensor:
    return x if copies == 1 else x[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _draw(N: int, K: int) -> Tensor:
    return torch.randperm(N)[: N - K].sort()[0]


def _complement(N: int, dropped: Tensor) -> Tensor:
    return torch.ones(N, dtype=torch.bool).scatter_(0, dropped.long().cpu(), False).nonzero()[:, 0]
