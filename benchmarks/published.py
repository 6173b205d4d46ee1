"""The published data flow in plain PyTorch: an oracle for the tests.

What the published implementation of MemoryLLM computes, and how: the pool is kept as hidden states, normed and
projected again for every prompt; memory and text are concatenated, heads expanded, a dense mask built; an update
gathers the kept rows and concatenates the new ones; adapters stay separate products. Written from the semantics,
independent of `memkernel`'s model and ops; its agreement with the published numbers is tested.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Published:
    """A checkpoint of the published layout and its pool `memory` [L, N, d]."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors", device=device)
        self.initialized = bool(tensors.pop("initialized"))
        self.weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.memory = self.weights.pop("memory")
        self.K = self.config["num_tokens"]
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_size = self.config["hidden_size"] // self.heads
        self.adapter = None

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V], every row of the pool projected anew."""
        self.adapter = "decoder_adapter" if self.config.get("add_decoder_lora") else "default"
        hidden = self.weights["model.embed_tokens.weight"][input_ids]
        for i in range(self.config["num_hidden_layers"]):
            rows = self._with_prefix(i, self.memory[i], hidden)
            hidden = self._layer(i, rows, queries=hidden.shape[1])
        return self._norm(hidden, "model.norm.weight") @ self.weights["lm_head.weight"].T

    def inject(self, input_ids: Tensor) -> Tensor:
        """[T] -> the new rows [L, K', d]."""
        self.adapter = "default"
        hidden = self.weights["model.embed_tokens.weight"][input_ids][None]
        T, delta = len(input_ids), []
        for i in range(self.config["num_hidden_layers"]):
            rows = self._with_prefix(i, self.memory[i, -self.K :], hidden).clone()
            rows[:, -self.K :] += self.weights["new_memory_positional_emb"]
            if delta and not self.initialized:  # the stored rows share storage with this layer's input
                delta[-1] = rows[:, -self.K :]
            out = self._layer(i, rows, queries=max(T, self.K) if self.initialized else T)
            delta.append(out[:, -self.K :])
            hidden = out[:, -T:]
        return torch.cat(delta)

    def update(self, input_ids: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Inject [T] ids and rewrite the pool; `dropped` [L, K] are the indices to drop. Returns the new rows."""
        delta = self.inject(input_ids)
        L, N, K = *self.memory.shape[:2], delta.shape[1]
        if not self.initialized:
            tail = delta[:, K - N % K :] if N % K else delta[:, :0]
            self.memory = torch.cat([delta] * (N // K) + [tail], dim=1) if K < N else delta[:, -N:]
            self.initialized = True
            return delta
        if dropped is None:
            draws = L if self.config.get("drop_memory_per_layer") else 1
            dropped = torch.stack([torch.randperm(N)[N - K :] for _ in range(draws)]).expand(L, K)
        kept = torch.ones(L, N, dtype=torch.bool).scatter_(1, dropped.long().cpu(), False)
        self.memory = torch.stack([torch.cat([self.memory[i][kept[i]], delta[i]]) for i in range(L)])
        return delta

    def _with_prefix(self, i: int, memory: Tensor, hidden: Tensor) -> Tensor:
        if not self.initialized:
            return hidden
        parts = [memory.expand(len(hidden), -1, -1), hidden]
        if self.config.get("add_bos_embedding", True):
            parts.insert(0, self.weights["bos_embedding"][i].expand(len(hidden), -1, -1))
        return torch.cat(parts, dim=1)

    def _layer(self, i: int, rows: Tensor, queries: int) -> Tensor:
        name = f"model.layers.{i}."
        x, S = rows[:, -queries:], rows.shape[1]
        normed = self._norm(rows, name + "input_layernorm.weight")
        q = self._heads(self._linear(normed[:, -queries:], name + "self_attn.q_proj"))
        k, v = (self._heads(self._linear(normed, name + f"self_attn.{part}_proj")) for part in "kv")
        position = torch.arange(S, device=rows.device)
        q, k = self._rope(q, position[-queries:]), self._rope(k, position)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        mask = position[None, :] <= position[-queries:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self._linear(attended, name + "self_attn.o_proj")
        h = self._norm(x, name + "post_attention_layernorm.weight")
        gate, up = (self._linear(h, name + f"mlp.{part}_proj") for part in ("gate", "up"))
        return x + self._linear(F.silu(gate) * up, name + "mlp.down_proj")

    def _linear(self, x: Tensor, module: str) -> Tensor:
        if module + ".weight" in self.weights:
            return x @ self.weights[module + ".weight"].T
        lora = self.config["lora_config"]
        a, b = (self.weights[f"{module}.lora_{part}.{self.adapter}.weight"] for part in "AB")
        return x @ self.weights[module + ".base_layer.weight"].T + (x @ a.T @ b.T) * (lora["lora_alpha"] / lora["r"])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[weight], self.config["rms_norm_eps"])

    def _rope(self, x: Tensor, position: Tensor) -> Tensor:
        scaling = self.config.get("rope_scaling") or {"type": "linear", "factor": 1.0}
        assert scaling["type"] == "linear", "only what published MemoryLLM checkpoints use"
        half = torch.arange(0, self.head_size, 2, device=x.device).float()
        inverse = 1.0 / self.config["rope_theta"] ** (half / self.head_size)
        angle = (position.float() / scaling["factor"])[:, None] * inverse
        cos, sin = (torch.cat([f(angle)] * 2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin
