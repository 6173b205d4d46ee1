"""One session's machine, model and contenders: what every benchmark shares, made when first asked for."""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.published import Published
from benchmarks.rivals import HuggingFace
from benchmarks.shapes import SHAPES, Least, Work, filled_memory, random_model
from benchmarks.timing import Ceilings, Clock, Contender, Gauge
from memkernel import reference
from memkernel.config import ModelConfig
from memkernel.engine import Engine

# Relative Frobenius error up to which outputs agree, per dtype: of one op against float64, of a whole forward of four
# layers against the published data flow in the same dtype. There the roundings of both add up over the layers, the
# cosines that the published one rounds to bfloat16 included; rows hold what it came to.
OP_BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
FOUR_LAYERS_BOUND = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@dataclass
class Case:
    """One workload at one size: how to make each contender, the truth, and the least work."""

    builders: dict[str, Callable[[], Contender]]
    truth: list[Tensor] | tuple[str, ...]  # or the contenders whose output is it, the first of them that runs
    bound: float
    work: Work
    unavailable: dict[str, str] = field(default_factory=dict)  # contender -> why it does not run here
    cold: bool = False  # evict the caches before each call: for work that would fit into them
    once: bool = False  # a minute's work: neither profiled nor warmed up
    budget: float = 2.0  # seconds of timing, if the least rounds take less
    holds: object = None  # what must live as long as the case: a temporary folder

    @classmethod
    def nobody(cls, names: Sequence[str], reason: str) -> "Case":
        """A case that nobody runs here."""
        return cls(dict.fromkeys(names), [], 0.0, Work(), unavailable=dict.fromkeys(names, reason))


class Lab:
    """The models share their weights; a case that changes a memory forks it."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, timed: bool):
        self.shape, self.raw, self.device, self.dtype, self.timed = shape, SHAPES[shape], device, dtype, timed
        self.config = ModelConfig.from_dict(self.raw)
        self.least = Least(self.config, dtype)
        self.clock = Clock(device)

    @property
    def model_bound(self) -> float:
        """Of a whole forward: the difference of two right ones grows nearly with the number of layers."""
        return FOUR_LAYERS_BOUND[self.dtype] * max(1, self.config.num_layers / 4) ** 0.75

    @cached_property
    def gauge(self) -> Gauge:
        return Gauge(self.clock, self.device, self.dtype, tiny=self.shape == "tiny")

    @cached_property
    def ceilings(self) -> Ceilings:
        """The best of the session's beginning; each round of a case has its own."""
        return self.gauge(calls=8)

    @cached_property
    def _weights(self):
        return random_model(self.raw, self.dtype, self.device)

    @cached_property
    def engine(self) -> Engine:
        model, tensors = self._weights
        return Engine(model, filled_memory(model, tensors["memory"]), Path("benchmark"))

    @cached_property
    def reference(self) -> Engine:
        """The same weights on the plain PyTorch ops."""
        model = copy.copy(self.engine.model)
        model.ops = reference
        memory = self.engine.memory.fork()
        memory.ops = reference
        return Engine(model, memory, Path("benchmark"))

    @property
    def published_tensors(self) -> dict[str, Tensor]:
        """The weights and the pool under the names of the published checkpoint layout."""
        return self._weights[1]

    def published(self) -> Published:
        """A new object each time, on the same weights, with a pool of its own: updates overwrite it."""
        return Published(self.raw, self.published_tensors | {"memory": self.published_tensors["memory"].clone()})

    @cached_property
    def huggingface(self) -> HuggingFace:
        return HuggingFace(self.raw, self.engine)

    def ids(self, *shape: int, seed: int = 0) -> Tensor:
        """Random token ids, the same for every contender."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)

    def dropped(self, chunks: int) -> list[Tensor]:
        """Ranks [L, W] that each of so many updates drops, for outputs to be compared."""
        generator = torch.Generator().manual_seed(1)
        L, M, W = self.config.num_layers, self.config.memory_rows, self.config.write_rows
        return [torch.stack([torch.randperm(M, generator=generator)[:W] for _ in range(L)]) for _ in range(chunks)]

    def random(self, *shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=std, generator=generator)

    def release(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
