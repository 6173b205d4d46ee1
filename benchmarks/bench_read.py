"""Reading a prompt (time to first token) and decoding on one memory."""

import pytest
import torch
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.rivals import CACHES, rewinder
from benchmarks.timing import Contender
from memkernel.engine import Engine

PROMPT_TOKENS = 64  # of the sequences that decode
LARGEST_LOGITS = 1 << 29  # bytes of T x H x M logits up to which the reference is run


def huggingface(lab: Lab, input_ids: Tensor, prompt: Tensor | None = None) -> Contender:
    """transformers with its quicker cache: the last token's logits of `input_ids` [B, T], after `prompt` [1, T']. The
    choice is made for the first case of a kind (one token, more, decoding) and stands for its larger ones."""
    rival, kind = lab.huggingface, (prompt is None, input_ids.shape[1] > 1)

    def contender(name: str) -> Contender:
        cache = rival.cache(name, *input_ids.shape, prompt)
        call = lambda: chosen(rival.forward(input_ids, cache))  # noqa: E731
        return Contender(call, before=rewinder(cache), configuration=name)

    def seconds(name: str) -> float:
        one = contender(name)
        return min(lab.clock.seconds(one.call, one.before)[0] for _ in range(2))

    if kind not in rival.quicker_cache:
        rival.quicker_cache[kind] = min(CACHES, key=seconds)
    return contender(rival.quicker_cache[kind])


def chosen(logits: Tensor) -> list[Tensor]:
    """[B, T, V] -> the last token's [B, V], once the token that they favour is known to the host."""
    logits[:, -1].argmax(-1).tolist()
    return [logits[:, -1]]


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
        return Contender(lambda: chosen(rival.prefill(ids)[0]))

    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "published": published,
            "reference": lambda: engine_contender(lab.reference),
            "transformers": lambda: huggingface(lab, ids),
        },
        truth=("published", "reference"),
        bound=lab.model_bound,
        work=lab.least.read(T),
        unavailable=reference_too_large(lab, T),
    )


@pytest.mark.parametrize("contender", ["memkernel", "reference", "published", "transformers"])
@pytest.mark.parametrize("T", [1, 16, 64, 512, 2048], ids="T{}".format)
def bench_first_token(race, contender, T):
    race("first token", {"T": T}, contender, lambda lab: first_token_case(lab, T))


def decode_case(lab: Lab, B: int) -> Case:
    """One step of B sequences on one memory, with one prompt and unequal tokens after it; every call is that step."""
    prompt, tokens = lab.ids(1, PROMPT_TOKENS), lab.ids(B, 1, seed=1)

    def engine_contender(engine: Engine, at_once: int = B) -> Contender:
        requests, _ = engine._requests([prompt[0]] * at_once, {"max_tokens": 2})
        _, decoder = engine._decoders.take(requests, engine.memory)
        decoder.model = lab.engine.model  # the reference takes a minute to read so many prompts
        decoder.begin(requests, engine.memory)
        decoder.model = engine.model
        decoder.collect()
        start, used = decoder.cache.start.clone(), decoder.cache.used

        def rewind(first: int = 0) -> None:
            decoder.sampler.tokens[:at_once] = tokens[first : first + at_once, 0]
            decoder.cache.start.copy_(start)
            decoder.cache.used = used

        def call() -> list[Tensor]:
            logits = []
            for first in range(0, B, at_once):
                if first:
                    rewind(first)
                decoder.step()
                decoder.collect()
                logits.append(decoder.logits[:at_once].clone() if at_once < B else decoder.logits[:B])
            return [logits[0] if at_once == B else torch.cat(logits)]

        for _ in range(2):  # on a CUDA device the second captures the graph that is replayed from then on
            rewind()
            call()
        return Contender(call, before=rewind)

    def published() -> Contender:
        rival = lab.published()
        _, cache = rival.prefill(prompt)
        filled = [[rows.repeat(B, 1, 1, 1) for rows in pair] for pair in cache]
        return Contender(lambda: chosen(rival.decode(tokens, list(filled))[0]))  # it replaces what is in the list

    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "published": published,
            "one by one": lambda: engine_contender(lab.engine, at_once=1),
            "reference": lambda: engine_contender(lab.reference),
            "transformers": lambda: huggingface(lab, tokens, prompt),
        },
        unavailable={"one by one": "it is one"} if B == 1 else {},
        truth=("published", "reference"),
        bound=lab.model_bound,
        work=lab.least.read(1, past=1 + PROMPT_TOKENS, sequences=B),
    )


@pytest.mark.parametrize("contender", ["memkernel", "one by one", "reference", "published", "transformers"])
@pytest.mark.parametrize("B", [1, 8, 32], ids="B{}".format)
def bench_decode(race, contender, B):
    race("decode", {"B": B}, contender, lambda lab: decode_case(lab, B))
