"""The attention op alone, over every layer's pool in turn: caches hold nothing of a pool when its turn comes."""

import dataclasses
import mmap
from unittest import mock

import pytest
import torch

from benchmarks import rivals
from benchmarks.lab import OP_BOUND, Case, Lab
from benchmarks.rivals import AttentionInputs
from benchmarks.timing import Contender
from memkernel import huge_pages, ops, reference

CONTENDERS = ["memkernel", "ordinary pages", "reference", "sdpa", "sdpa-merged", "sdpa-cudnn", "flex"]
UNSEEN = 8  # cache rows beyond those that a query may see
CHECKED = 8  # queries of each sequence that are compared with float64


def attention_inputs(lab: Lab, T: int, past: int, B: int) -> list[AttentionInputs]:
    config, memory = lab.config, lab.engine.memory
    lab.engine.model.new_cache(1, 1, memory)  # brings the rotated keys up to date
    G, D = config.num_kv_heads, config.head_size
    layers = []
    for i in range(config.num_layers):
        query = lab.random(B, T, config.num_heads, D, std=2.0, seed=i)
        # Own keys are loud: one row too many or too few among thousands must show.
        key, value = (lab.random(B, past + T + UNSEEN, G, D, std=2.0, seed=i + 1000 * n) for n in (1, 2))
        key[1:, 0], value[1:, 0] = key[0, 0], value[0, 0]  # bos
        key[:, past + T :], value[:, past + T :] = 1e4, 1e4  # a kernel that sees them is found out
        start = torch.full((B,), past, dtype=torch.int32, device=lab.device)
        layers.append(
            AttentionInputs(query, memory.rotated_key[i, None], memory.value[i, None], key, value, start),
        )
    return layers


def attention_case(lab: Lab, T: int, past: int, B: int) -> Case:
    layers = attention_inputs(lab, T, past, B)
    step = max(1, (T - 1) // (CHECKED - 1))
    checked = torch.arange(0, T, step)

    def truth(x: AttentionInputs) -> torch.Tensor:
        """In float64, the checked queries as sequences of one token each: [B, checked, H, D]."""
        query = x.query[:, ::step].flatten(0, 1).unsqueeze(1).double()
        pools = (x.memory_key.double(), x.memory_value.double())
        own = (rows.double().repeat_interleave(len(checked), dim=0) for rows in (x.key, x.value))
        start = (x.start[:, None] + checked.to(x.start)).flatten()
        return reference.memory_attention(query, *pools, *own, start).unflatten(0, (B, -1)).squeeze(2)

    def contender(calls) -> Contender:
        return Contender(lambda: [call()[:, ::step] for call in calls])

    def with_ops(namespace, layers=layers):
        return contender(
            [
                lambda x=x: namespace.memory_attention(x.query, x.memory_key, x.memory_value, x.key, x.value, x.start)
                for x in layers
            ]
        )

    def ordinary_pages() -> Contender:
        """The same pools in pages of the usual size."""
        names = ("memory_key", "memory_value")
        with mock.patch.object(huge_pages, "ADVICE", mmap.MADV_NOHUGEPAGE):
            pools = [{name: huge_pages.copy(getattr(x, name), lab.device) for name in names} for x in layers]
        return with_ops(ops, [dataclasses.replace(x, **pool) for x, pool in zip(layers, pools, strict=True)])

    on_gpu = lab.device.type == "cuda"
    flash = rivals.flash_cuda if on_gpu else rivals.flash_cpu
    builders = {
        "memkernel": lambda: with_ops(ops),
        "ordinary pages": ordinary_pages,
        "reference": lambda: with_ops(reference),
        "sdpa": lambda: contender([rivals.sdpa(x) for x in layers]),
        "sdpa-merged": lambda: contender([rivals.sdpa_merged(x, flash) for x in layers]),
        "sdpa-cudnn": lambda: contender([rivals.sdpa_merged(x, rivals.cudnn) for x in layers]),
        "flex": lambda: contender([rivals.flex(x) for x in layers]),
    }
    unavailable = {}
    if on_gpu or huge_pages.setting() not in ("always", "madvise"):
        unavailable["ordinary pages"] = "all tensors have the same pages here"
    if not on_gpu:
        unavailable["sdpa-cudnn"] = "cuDNN needs CUDA"
        if lab.shape == "tiny" or (T, B) not in ((64, 1), (1, 1)):
            unavailable["flex"] = (
                "on a CPU compiled for T 64 and for one query only: compiling takes longer than timing"
            )
    return Case(
        builders=builders,
        truth=[truth(x) for x in layers],
        bound=OP_BOUND[lab.dtype],
        work=lab.least.attention(T, lab.config.memory_rows, past, B).times(lab.config.num_layers),
        unavailable=unavailable,
        cold=True,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("T", [64, 512], ids="T{}".format)
def bench_attention_prefill(race, contender, T):
    race("attention, prefill", {"T": T}, contender, lambda lab: attention_case(lab, T, past=1, B=1))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("B", [1, 8, 32], ids="B{}".format)
def bench_attention_decode(race, contender, B):
    race("attention, decode", {"B": B}, contender, lambda lab: attention_case(lab, 1, past=65, B=B))
