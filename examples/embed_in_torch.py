"""The memory inside a plain torch.nn module: two registered ops, compiled whole, equal to SDPA over concatenated rows.

    python examples/embed_in_torch.py

`memory_attention` reads a memory that every query sees and the sequence's own rows where each of them lies; SDPA needs
them concatenated, and a mask. The ops pick their kernel by device, and torch.compile sees no graph break.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memkernel.ops  # noqa: F401 - registers torch.ops.memkernel


class MemoryAttention(nn.Module):
    """Grouped-query attention of T text rows over M memory rows and a sequence cache."""

    def __init__(self, width: int, heads: int, kv_heads: int, positions: int, theta: float = 10000.0):
        super().__init__()
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        frequency = theta ** -(torch.arange(0, self.head_size, 2) / self.head_size)
        angle = torch.arange(positions)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], start: Tensor) -> Tensor:
        """x [B, T, E]; memory: rotated keys and values [1, M, G, D]; cache: keys and values [B, S, G, D], written at
        rows start[b]..start[b] + T - 1 of sequence b; start [B] int32. The text stands at positions M + start[b] on."""
        parts = [self.heads, self.kv_heads, self.kv_heads]
        query, key, value = self.qkv(x).unflatten(-1, (-1, self.head_size)).split(parts, dim=2)
        rows = memory[0].shape[1]
        query = torch.ops.memkernel.rope_write_(*cache, query, key, value, self.cos, self.sin, start, rows)
        return self.out(torch.ops.memkernel.memory_attention(query, *memory, *cache, start).flatten(2))


def with_sdpa(layer: MemoryAttention, query: Tensor, memory: tuple, cache: tuple, start: Tensor) -> Tensor:
    """What attention is by definition: all rows side by side, and a mask of what each query sees."""
    B, T = query.shape[:2]
    M, S = memory[0].shape[1], cache[0].shape[1]
    pairs = zip(memory, cache, strict=True)
    key, value = (torch.cat([x.expand(B, -1, -1, -1), own], dim=1).transpose(1, 2) for x, own in pairs)
    last_BT = M + start[:, None] + torch.arange(T, device=query.device)
    mask = torch.arange(M + S, device=query.device) <= last_BT[..., None]
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, mask.unsqueeze(1), enable_gqa=True)
    return layer.out(attended.transpose(1, 2).flatten(2))


def rotated(layer: MemoryAttention, x: Tensor, position: Tensor) -> Tensor:
    """x [B, T, heads, D] at position [B, T], rotated pair by pair."""
    cos, sin = layer.cos[position].unsqueeze(2), layer.sin[position].unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.inference_mode()
def main() -> float:
    """Prefill 5 tokens, then decode 3 one by one; returns the largest relative error of the compiled module."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, M, S, width, heads, kv_heads = 2, 96, 16, 128, 8, 2
    layer = MemoryAttention(width, heads, kv_heads, positions=M + S).to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    memory = tuple(torch.randn(2, 1, M, kv_heads, width // heads, device=device))
    cache = tuple(torch.zeros(2, B, S, kv_heads, width // heads, device=device))
    start, worst = torch.tensor([0, 2], dtype=torch.int32, device=device), 0.0
    print(f"{B} sequences on one memory of {M} rows, {heads} query and {kv_heads} key/value heads, on {device}")
    for T in (5, 1, 1, 1):
        x = torch.randn(B, T, width, device=device)
        got = compiled(x, memory, cache, start)
        query = layer.qkv(x).unflatten(-1, (-1, width // heads))[:, :, :heads]
        position = M + start[:, None] + torch.arange(T, device=device)
        want = with_sdpa(layer, rotated(layer, query, position), memory, cache, start)
        error = ((got - want).norm() / want.norm()).item()
        worst = max(worst, error)
        print(f"{T} tokens after {start.tolist()}: relative difference from SDPA {error:.1e}")
        start += T
    return worst


if __name__ == "__main__":
    main()
