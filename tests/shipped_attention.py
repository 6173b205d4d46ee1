"""Calls of the attention op that between them launch every kernel configuration that it ships, for compile_kernels."""

import torch

from memkernel.kernels.memory_attention import memory_attention


def call(dtype, D, B, T, M, Q=4, G=8, S=2048):
    def run():
        def rows(*shape):
            return torch.empty(shape, dtype=dtype, device="meta")

        start = torch.empty(B, dtype=torch.int32, device="meta")
        memory, own = (1, M, G, D), (B, S, G, D)
        memory_attention(rows(B, T, G * Q, D), rows(*memory), rows(*memory), rows(*own), rows(*own), start)

    return run


CASES = {
    f"{kind} {str(dtype)[6:]} D{D}": call(dtype, D, *shape)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for D in (128, 64, 32, 16)
    for kind, shape in {
        "prefill": (1, 2048, 12800),
        "prefill, ragged and split": (1, 60, 12801),
        "decode 16": (1, 1, 12800),
        "decode 32": (8, 1, 12800),
        "decode 64": (16, 1, 12801),
        "decode 128": (32, 1, 12800),
        "decode 128, 16 tokens": (8, 16, 12801),
    }.items()
}
