"""Writing text into memories, chunk after chunk; where a length repeats, by replayed graphs."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memkernel.graphs import Graph, Graphs
from memkernel.memory import Delta, Memory
from memkernel.model import Llama

KEPT_LENGTHS = 8  # chunk lengths whose graphs are kept for a memory


class Updater:
    """One engine's updates. The rows of an injection go through buffers that every memory's graphs share."""

    def __init__(self, model: Llama, graphs: Graphs):
        self.model, self.graphs = model, graphs
        self.delta: Delta | None = None
        self.of: WeakKeyDictionary[Memory, MemoryGraphs] = WeakKeyDictionary()

    def write(self, input_ids: Tensor, memory: Memory, dropped: Tensor | None) -> None:
        """Take in one chunk [T] of token ids on the model's device, whole or not at all."""
        if not self.graphs.static or not memory.initialized:  # the first fill is done once
            memory.write(self.model.inject(input_ids, memory), dropped)
            return
        with torch.inference_mode(False):  # what is made here outlives the mode of this call
            if self.delta is None:
                self.delta = Delta.empty(memory.config, memory.config.write_rows, memory.key)
            if memory not in self.of:
                self.of[memory] = MemoryGraphs(self.graphs)
            inject, static_ids = self.of[memory].inject(input_ids)
        static_ids.copy_(input_ids)
        inject.run(lambda: self.model.inject(static_ids, memory, self.delta))
        memory.write(self.delta, dropped, run=self.of[memory].write.run)


class MemoryGraphs:
    """The graphs of one memory: its write, and an injection for each of the lengths that came last."""

    def __init__(self, graphs: Graphs):
        self.graphs, self.write = graphs, Graph(graphs)
        self.by_length: dict[int, tuple[Graph, Tensor]] = {}  # the latest last

    def inject(self, input_ids: Tensor) -> tuple[Graph, Tensor]:
        """The graph for ids of this length, and the ids that it reads."""
        length = len(input_ids)
        found = self.by_length.pop(length, None) or (Graph(self.graphs), torch.empty_like(input_ids))
        self.by_length[length] = found
        if len(self.by_length) > KEPT_LENGTHS:
            del self.by_length[next(iter(self.by_length))]
        return found
