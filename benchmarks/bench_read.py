"""Reading a prompt (time to first token) and decoding on one memory."""

import pytest
import torch
from torch import Tensor

from benchmarks.lab import MODEL_BOUND, Case, Lab
from benchmarks.rivals import rewinder
from benchmarks.timing import Contender
from memkernel.engine import Engine

PROMPT_TOKENS = 64  # of the sequences that decode
LARGEST_LOGITS = 2 << 30  # bytes of T x H x M logits up to which the reference is run


def huggingface(lab: Lab, input_ids: Tensor, prompts: Tensor | None = None) -> Contender:
    """transformers with its quicker cache: the last token's logits of `input_ids` [B, T], after `prompts` [B, T']."""
    rival, best = lab.huggingface, None
    for kind in ("StaticCache", "DynamicCache"):
        cache = rival.cache(kind, *(input_ids if prompts is None else torch.cat([prompts, input_ids], dim=1)).shape)
        if prompts is not None:
            rival.forward(prompts, cache)
        contender = Contender(
            call=lambda cache=cache: rival.forward(input_ids, cache).argmax(-1),
            output=lambda cache=cache: [rival.forward(input_ids, cache)],
            before=rewinder(cache),
            configuration=kind,
        )
        del cache
        seconds = min(lab.clock.seconds(contender.call, contender.before)[0] for _ in range(2))
        if best is None or seconds < best[0]:
            best = (seconds, contender)
        del contender
        lab.release()
    return best[1]


def reference_too_large(lab: Lab, T: int) -> dict[str, str]:
    logits = 4 * T * lab.config.num_heads * lab.config.memory_rows
    if logits <= LARGEST_LOGITS:
        return {}
    return {"reference": f"materialises {logits / 2**30:.1f} GiB of attention logits, several times"}


def first_token_case(lab: Lab, T: int) -> Case:
    ids = lab.ids(1, T)

    def engine_contender(engine: Engine) -> Contender:
        return Contender(
            call=lambda: engine.generate(ids, max_tokens=1),
            output=lambda: [engine.logits(ids)[:, -1]],
        )

    def published() -> Contender:
        rival = lab.published()
        return Contender(
            call=lambda: rival.prefill(ids)[0][:, -1].argmax(-1).item(),
            output=lambda: [rival.prefill(ids)[0][:, -1]],
        )

    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "reference": lambda: engine_contender(lab.reference),
            "published": published,
            "transformers": lambda: huggingface(lab, ids),
        },
        truth=[lab.published().prefill(ids)[0][:, -1]],
        bound=MODEL_BOUND[lab.dtype],
        work=lab.least.read(T),
        unavailable=reference_too_large(lab, T),
    )


@pytest.mark.parametrize("contender", ["memkernel", "reference", "published", "transformers"])
@pytest.mark.parametrize("T", [1, 16, 64, 512, 2048], ids="T{}".format)
def bench_first_token(race, contender, T):
    race("first token", {"T": T}, contender, lambda lab: first_token_case(lab, T))


def decode_case(lab: Lab, B: int) -> Case:
    """One step of B sequences, each with a prompt of its own, on one memory; every call is the same step."""
    prompts, tokens = lab.ids(B, PROMPT_TOKENS), lab.ids(B, 1, seed=1)

    def engine_contender(engine: Engine) -> Contender:
        _, cache, memory, _ = engine._prefill(list(prompts), 1)

        def step() -> Tensor:
            return engine.model.logits(engine.model.read(tokens, cache, memory)[:, -1])

        return Contender(call=lambda: step().argmax(-1), output=lambda: [step()])

    rival = lab.published()
    _, filled = rival.prefill(prompts)

    def published_step() -> Tensor:
        return rival.decode(tokens, list(filled))[0][:, -1]  # it replaces what is in the list

    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "reference": lambda: engine_contender(lab.reference),
            "published": lambda: Contender(lambda: published_step().argmax(-1), lambda: [published_step()]),
            "transformers": lambda: huggingface(lab, tokens, prompts),
        },
        truth=[published_step()],
        bound=MODEL_BOUND[lab.dtype],
        work=lab.least.read(1, past=1 + PROMPT_TOKENS, sequences=B),
        min_rounds=3 if B < 32 else 2,
    )


@pytest.mark.parametrize("contender", ["memkernel", "reference", "published", "transformers"])
@pytest.mark.parametrize("B", [1, 8, 32], ids="B{}".format)
def bench_decode(race, contender, B):
    race("decode", {"B": B}, contender, lambda lab: decode_case(lab, B))
