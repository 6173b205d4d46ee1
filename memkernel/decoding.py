"""Answering prompts together: one prefill, then steps that are the same work each time.

On a CUDA device a step is one replayed graph. It chooses its tokens on the device and feeds them to the next step; the
host reads them one step late, while the next step runs, and drops what was computed after a request's end.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memkernel.graphs import Graph, Graphs
from memkernel.memory import Memory
from memkernel.model import Llama, SequenceCache
from memkernel.request import Request
from memkernel.sampling import Kind, Sampler

LEAST_CAPACITY = 256  # text rows of the smallest cache of fixed shape
IDLE_DECODERS = 8  # kept for the next prompts, each with its cache and graph


def prefill(model: Llama, prompts: list[Tensor], cache: SequenceCache, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """Read prompts [T] int64 of any lengths; returns hidden [B, longest T, E] and the lengths [B] int32."""
    device, longest = cache.key.device, max(map(len, prompts))
    # Before anything is read: a copy from the host's pageable memory waits for all that the device was given.
    lengths = torch.tensor([len(ids) for ids in prompts], dtype=torch.int32, device=device)
    hidden = model.read(pad_sequence(prompts, batch_first=True).to(device), cache, memory)
    cache.advance(lengths, longest)
    return hidden, lengths


class Decoder:
    """A cache, a sampler and what reads its choices, for B sequences of so many rows over one memory.

    Everything that a step touches keeps its address. Sequences beyond those asked for are dummies: they stand at the
    cache's first text row, and nobody looks at them.
    """

    def __init__(self, model: Llama, memory: Memory | None, kind: Kind, batch: int, capacity: int, graphs: Graphs):
        self.model, self.memory, self.static = model, memory, graphs.static
        self.cache = model.new_cache(batch, capacity, memory)
        device = self.cache.key.device
        self.sampler = Sampler(kind, batch, model.config.vocab_size, device)
        self.graph = Graph(graphs)
        self.logits = None  # [B, V] of the last step, until another graph is replayed
        on_gpu = device.type == "cuda"
        # Two of each: one step's outcome is read while that of the next is written.
        self.outcomes = [torch.zeros(self.sampler.outcome.shape, dtype=torch.float64, pin_memory=on_gpu) for _ in "ab"]
        self.copied = [torch.cuda.Event() if on_gpu else None for _ in "ab"]
        self.steps = self.collected = 0  # whose outcomes were sent to the host, and read there

    def begin(self, requests: list[Request], memory: Memory | None) -> None:
        """Read the prompts of at most B requests and choose their first tokens."""
        self.memory, self.steps, self.collected = memory, 0, 0
        self.model.begin(self.cache, memory)
        self.sampler.begin(requests)
        own, prompts = self.cache.first(len(requests)), [request.prompt_ids for request in requests]
        self.cache.used += max(map(len, prompts))  # before they are read: it says what the next `begin` must clear
        hidden, lengths = prefill(self.model, prompts, own, memory)
        last = hidden.new_zeros(len(self.sampler.tokens), hidden.shape[2])
        last[: len(requests)] = hidden[torch.arange(len(requests), device=hidden.device), lengths.long() - 1]
        self._choose(last)
        self._send()

    @torch.inference_mode()
    def step(self) -> None:
        """Read the tokens chosen last and choose the next ones. Waits for nothing on a CUDA device."""
        self.graph.run(self._step)
        self.cache.used += 1
        self._send()

    def collect(self) -> list[tuple[int, float, list[int], list[float]]]:
        """Wait for the oldest step not collected; the arguments of `Request.take`, for each sequence."""
        turn = self.collected % 2
        if self.copied[turn]:
            self.copied[turn].synchronize()
        self.collected += 1
        return [self.sampler.kind.unpack(row) for row in self.outcomes[turn].tolist()]

    def _step(self) -> None:
        hidden = self.model.read(self.sampler.tokens[:, None], self.cache, self.memory, whole_cache=self.static)
        self.cache.start += 1
        self._choose(hidden[:, 0])

    def _choose(self, hidden: Tensor) -> None:
        self.logits = self.model.logits(hidden)
        self.sampler.choose(self.logits)

    def _send(self) -> None:
        turn = self.steps % 2
        self.outcomes[turn].copy_(self.sampler.outcome, non_blocking=True)
        if self.copied[turn]:
            self.copied[turn].record(torch.cuda.current_stream(self.sampler.outcome.device))
        self.steps += 1


class Decoders:
    """One engine's decoders: those of fixed shape are kept, for the same memory and the same sizes, while it lives."""

    def __init__(self, model: Llama, graphs: Graphs):
        self.model, self.graphs = model, graphs
        # By memory, the model standing for none: sizes and decoder. The longest unused come first.
        self.idle: WeakKeyDictionary[Memory | Llama, list[tuple[tuple, Decoder]]] = WeakKeyDictionary()

    def run(self, requests: list[Request], memory: Memory | None) -> Iterator[None]:
        """Answer requests together, yielding when each of them that is not done has one more token."""
        steps = max(request.params.max_tokens for request in requests)
        key, decoder = self.take(requests, memory)
        try:
            decoder.begin(requests, memory)
            for step in range(1, steps + 1):
                if decoder.static and step < steps:  # the device goes on while the host looks at what is there
                    decoder.step()
                for request, chosen in zip(requests, decoder.collect(), strict=False):
                    if not request.finish_reason:
                        request.take(*chosen)
                yield
                if all(request.finish_reason for request in requests):
                    return
                if not decoder.static:
                    decoder.step()
        finally:
            self.give_back(key, decoder, memory)

    def take(self, requests: list[Request], memory: Memory | None) -> tuple[tuple, Decoder]:
        """A decoder for requests of these sizes, and the sizes."""
        kind = Kind.of([request.params for request in requests], self.model.config.vocab_size)
        batch = len(requests)
        capacity = max(len(r.prompt_ids) for r in requests) + max(r.params.max_tokens for r in requests) - 1
        if self.graphs.static:
            batch, capacity = _power_of_two(batch), _power_of_two(max(capacity, LEAST_CAPACITY))
        key = kind, batch, capacity
        idle = self.idle.get(self._owner(memory), [])
        for i, (idle_key, decoder) in enumerate(idle):
            if idle_key == key:
                del idle[i]
                return key, decoder
        try:
            return key, Decoder(self.model, memory, *key, self.graphs)
        except torch.OutOfMemoryError:
            if not self.idle:
                raise
            self.idle.clear()
        return key, Decoder(self.model, memory, *key, self.graphs)

    def give_back(self, key: tuple, decoder: Decoder, memory: Memory | None) -> None:
        decoder.memory = None  # it must not keep it alive
        if not decoder.static:
            return
        owner = self._owner(memory)
        self.idle[owner] = [*self.idle.pop(owner, []), (key, decoder)]
        if sum(map(len, self.idle.values())) > IDLE_DECODERS:
            next(idle for idle in self.idle.values() if idle).pop(0)

    def _owner(self, memory: Memory | None) -> Memory | Llama:
        return self.model if memory is None else memory


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
