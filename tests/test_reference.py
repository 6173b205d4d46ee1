"""Every reference op against its definition, written out in fp64, one row at a time."""

import pytest
import torch
import torch.nn.functional as F

from memkernel import reference
from memkernel.config import Rope
from tests.compare import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOUD = 1e4  # finite, and enough to swamp a result that sees it


def ids(dtype):
    return str(dtype).removeprefix("torch.")


ATTENTION = {  # B, P, T, H, G, D, M, S, starts
    "one-token": (1, 1, 1, 4, 2, 64, 33, 8, [7]),
    "prefill": (1, 1, 17, 4, 2, 64, 33, 18, [1]),
    "no-memory": (1, 1, 9, 4, 4, 32, 0, 9, [0]),
    "ragged-batch-on-one-pool": (3, 1, 5, 4, 1, 16, 40, 20, [1, 15, 6]),
    "two-pools-for-four": (4, 2, 3, 6, 2, 16, 11, 9, [0, 1, 2, 6]),
    "head-128": (2, 1, 2, 2, 1, 128, 257, 4, [1, 2]),
}


def attention_case(name, dtype):
    B, P, T, H, G, D, M, S, starts = ATTENTION[name]
    tensors = [torch.randn(B, T, H, D), *torch.randn(2, P, M, G, D), *torch.randn(2, B, S, G, D)]
    return [t.to(dtype) for t in tensors] + [torch.tensor(starts, dtype=torch.int32)]


def attention_by_rows(query, memory_key, memory_value, key, value, start):
    """softmax(q k^T / sqrt(D)) v for each query alone, in fp64, over exactly the rows it may see."""
    (B, T, H, D), P, G = query.shape, len(memory_key), key.shape[2]
    out = torch.empty(query.shape, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                pool, g, seen = b // (B // P), h // (H // G), int(start[b]) + t + 1
                keys = torch.cat([memory_key[pool, :, g], key[b, :seen, g]]).double()
                values = torch.cat([memory_value[pool, :, g], value[b, :seen, g]]).double()
                out[b, t, h] = (query[b, t, h].double() @ keys.T / D**0.5).softmax(-1) @ values
    return out


def attention_plain(query, memory_key, memory_value, key, value, start):
    """Plain PyTorch in the same dtype: concatenation, head expansion, dense mask, SDPA."""
    (B, T, H, _), P, G, M, S = query.shape, len(memory_key), key.shape[2], memory_key.shape[1], key.shape[1]
    keys, values = (
        torch.cat([memory.repeat_interleave(B // P, 0), own], 1).repeat_interleave(H // G, 2).transpose(1, 2)
        for memory, own in ((memory_key, key), (memory_value, value))
    )
    own_seen = torch.arange(S) <= (start[:, None] + torch.arange(T))[..., None]
    mask = torch.cat([torch.ones(B, T, M, dtype=torch.bool), own_seen], -1)[:, None]
    return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ATTENTION)
def test_memory_attention(name, dtype):
    case = attention_case(name, dtype)
    out = reference.memory_attention(*case)
    assert out.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(out, attention_by_rows(*case), rtol=1e-12, atol=1e-13)
    else:
        assert_no_worse(name, out, attention_by_rows(*case), attention_plain(*case))


@pytest.mark.parametrize("name", ATTENTION)
def test_memory_attention_does_not_see_later_rows(name):
    query, memory_key, memory_value, key, value, start = attention_case(name, torch.float32)
    want = reference.memory_attention(query, memory_key, memory_value, key, value, start)
    for b, used in enumerate(start + query.shape[1]):
        key[b, used:], value[b, used:] = LOUD, LOUD
    assert torch.equal(want, reference.memory_attention(query, memory_key, memory_value, key, value, start))
    first = reference.memory_attention(query[:, :1], memory_key, memory_value, key, value, start)
    for b, used in enumerate(start + 1):  # all that only later queries see
        key[b, used:], value[b, used:] = LOUD, LOUD
    assert torch.equal(first, reference.memory_attention(query[:, :1], memory_key, memory_value, key, value, start))


def test_memory_attention_ignores_the_order_of_memory_rows():
    query, memory_key, memory_value, *own = attention_case("prefill", torch.float64)
    order = torch.randperm(memory_key.shape[1])
    want = reference.memory_attention(query, memory_key, memory_value, *own)
    got = reference.memory_attention(query, memory_key[:, order], memory_value[:, order], *own)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_norms_and_swiglu(dtype):
    x, y, weight = torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 5, 64, dtype=dtype), torch.rand(64).to(dtype) + 1
    total = x + y

    def norm(t):
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    out = reference.rms_norm(x, weight, 1e-5)
    exact = norm(x.double()) * weight.double()
    assert_no_worse("rms_norm", out, exact, norm(x) * weight)
    residual = x.clone()
    out = reference.add_rms_norm_(residual, y, weight, 1e-5)
    assert torch.equal(residual, total)
    assert_no_worse("add_rms_norm_", out, norm(total.double()) * weight.double(), norm(total) * weight)
    gate, up = x.chunk(2, -1)
    exact = F.silu(gate.double()) * up.double()
    assert_no_worse("swiglu", reference.swiglu(x), exact, gate * torch.sigmoid(gate) * up)


def test_linear():
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    want = (x[..., None, :] * weight).sum(-1)
    torch.testing.assert_close(reference.linear(x, weight), want, rtol=1e-14, atol=1e-14)


def rotated_by_hand(x, position, rope):
    """Each pair (i, i + D/2) is a complex number, turned by position times its frequency."""
    half = x.shape[-1] // 2
    angle = torch.as_tensor(position, dtype=torch.float64) * rope.frequencies(2 * half).double()
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones(half).double(), angle
    )
    return torch.cat([turned.real, turned.imag], -1)


def test_rope_write():
    rope = Rope(theta=10000.0)
    cos, sin = rope.table(64, 16, torch.device("cpu"))
    query, key, value = torch.randn(2, 2, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    whole = torch.full((2, 2, 10, 2, 16), -7.0)
    cache_key, cache_value = whole[0, :, 1:9], whole[1, :, 1:9]  # sentinels around the views
    start = torch.tensor([5, 1], dtype=torch.int32)
    rotated = reference.rope_write_(cache_key, cache_value, query, key, value, cos, sin, start, 11)
    expected = torch.full_like(whole, -7.0)
    for b in range(2):
        for t in range(3):
            row = int(start[b]) + t
            expected[0, b, 1 + row] = rotated_by_hand(key[b, t], 11 + row, rope)
            expected[1, b, 1 + row] = value[b, t]
            if t >= 1:  # the two queries belong to the last two rows
                want = rotated_by_hand(query[b, t - 1], 11 + row, rope)
                torch.testing.assert_close(rotated[b, t - 1].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole == -7.0, expected == -7.0)


def test_rotate_memory():
    rope = Rope(theta=500000.0, kind="linear", factor=1.5)
    cos, sin = rope.table(8, 16, torch.device("cpu"))
    key, rank = torch.randn(2, 6, 2, 16), torch.stack([torch.randperm(6), torch.randperm(6)]).int()
    rotated = torch.full_like(key, torch.nan)
    reference.rotate_memory_(rotated, key, rank, cos, sin, 1)
    for layer in range(2):
        for slot in range(6):
            want = rotated_by_hand(key[layer, slot], (int(rank[layer, slot]) + 1) / 1.5, rope)
            torch.testing.assert_close(rotated[layer, slot].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("M, W", [(12, 3), (12, 0), (12, 12), (1, 1), (33, 32)])
def test_memory_write_equals_gather_and_concatenate(M, W, dtype):
    """Bit for bit what moving the rows would give, read through `rank`; only W slots are touched."""
    L, shapes = 3, [(2, 4), (5,)]
    pools = [torch.randn(L, M, *shape).to(dtype) for shape in shapes]
    rank = torch.stack([torch.randperm(M) for _ in range(L)]).int()
    for _ in range(4):
        rows = [torch.randn(L, W, *shape).to(dtype) for shape in shapes]
        dropped = torch.stack([torch.randperm(M)[:W] for _ in range(L)]).int()
        before = [pool.clone() for pool in pools]
        slots = [[int((rank[i] == r).nonzero()) for r in dropped[i]] for i in range(L)]
        want = []
        for pool, new in zip(pools, rows, strict=True):
            aged = torch.stack([pool[i, rank[i].argsort()] for i in range(L)])
            kept = [[r for r in range(M) if r not in dropped[i].tolist()] for i in range(L)]
            want.append(torch.stack([torch.cat([aged[i, kept[i]], new[i]]) for i in range(L)]))
        reference.memory_write_(pools, rank, rows, dropped)
        assert torch.equal(rank.sort(1).values, torch.arange(M).int().expand(L, M))
        for pool, old, new, aged in zip(pools, before, rows, want, strict=True):
            assert torch.equal(torch.stack([pool[i, rank[i].argsort()] for i in range(L)]), aged)
            for i in range(L):
                assert torch.equal(pool[i, slots[i]], new[i])  # new row j lies in the slot of dropped[j]
                others = [s for s in range(M) if s not in slots[i]]
                assert torch.equal(pool[i, others], old[i, others])


def draw_by_hand(seed, step, layer, rows, count):
    """The draw in plain Python integers."""

    def mix(x):
        x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
        x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
        return x ^ x >> 16

    key = mix((layer + 0x9E3779B9) % 2**32)
    for word in (seed % 2**32, seed >> 32, step % 2**32, step >> 32):
        key = mix(key ^ word)
    bits = max(2, (rows - 1).bit_length())

    def permute(x):
        high_bits, low_bits = bits // 2, bits - bits // 2
        high, low = x >> low_bits, x % 2**low_bits
        for i in range(12):
            high, low = low, (high ^ mix(low ^ mix((key + 0x9E3779B9 * (i + 1)) % 2**32))) % 2**high_bits
            high_bits, low_bits = low_bits, high_bits
        return high << low_bits | low

    drawn = []
    for x in range(count):
        x = permute(x)
        while x >= rows:
            x = permute(x)
        drawn.append(x)
    return drawn


@pytest.mark.parametrize("rows, count", [(1, 1), (2, 1), (5, 5), (128, 16), (100, 7), (12800, 256), (12801, 0)])
def test_draw_is_a_function_of_seed_step_and_layer(rows, count):
    seed, step = 2**40 + 12345, 2**33 + 7
    state = torch.tensor([seed, step])
    drawn = reference.draw_ranks(state, 3, rows, count, False)
    assert drawn.dtype == torch.int32
    assert drawn.tolist() == [draw_by_hand(seed, step, layer, rows, count) for layer in range(3)]
    assert all(len(set(layer)) == count for layer in drawn.tolist())
    shared = reference.draw_ranks(state, 3, rows, count, True)
    assert shared.tolist() == [drawn[0].tolist()] * 3


def test_mixed_dtypes_of_rounding():
    """rms_norm rounds the normed row to x's dtype before the weight, as Llama does."""
    x, weight = torch.randn(64).bfloat16(), torch.rand(64).bfloat16() + 1
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean() + 1e-6)
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), normed.bfloat16() * weight)
