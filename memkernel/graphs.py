"""CUDA graphs: work that is the same each time, launched by one call instead of by hundreds."""

import weakref
from collections.abc import Callable
from functools import cached_property

import torch

from memkernel import ops as registered_ops


class Graphs:
    """One engine's captured graphs, which share a pool for what lives within one replay only.

    `static`: work is arranged as a graph needs it, shapes and addresses the same each time. So it is on a CUDA device
    with kernels of its own: the plain PyTorch draw waits for the host. The tests set it on a CPU, where the same work
    is called instead of replayed.
    """

    def __init__(self, device: torch.device, ops):
        has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("memkernel::draw_ranks", "CUDA")
        self.static = device.type == "cuda" and ops is registered_ops and has_kernels
        self.device = device
        self.captured = weakref.WeakSet()  # of Graph
        self._pool = None

    @cached_property
    def side(self) -> torch.cuda.Stream:
        """Where work is first done and then captured: one stream, since freed memory and the workspaces of matrix
        products are kept for each, and one on this device, as the one that torch.cuda.graph makes for all need not be.
        """
        return torch.cuda.Stream(self.device)

    def pool(self):
        if not self.captured:  # a pool that no graph uses any more is gone
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class Graph:
    """One piece of work on tensors that keep their addresses.

    The first run is the work itself, on a side stream, which compiles and initialises what a capture must find ready;
    the second captures it, and from then on it is replayed. Work that is done once is never captured. The function is
    not kept, since it would keep alive what it works on: it must be the same each time, touch nothing of the host's and
    return nothing.
    """

    def __init__(self, graphs: Graphs):
        self.graphs, self.captured, self.warm = graphs, None, False

    def run(self, function: Callable[[], None]) -> None:
        if self.graphs.device.type != "cuda":
            function()
            return
        with torch.cuda.device(self.graphs.device):
            if not self.warm:
                self._on_side_stream(function)
                self.warm = True
                return
            if self.captured is None:
                self._capture(function)
            self.captured.replay()

    def _on_side_stream(self, function: Callable[[], None]) -> None:
        main, side = torch.cuda.current_stream(), self.graphs.side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            function()
        main.wait_stream(side)

    def _capture(self, function: Callable[[], None]) -> None:
        graph, place = torch.cuda.CUDAGraph(), {"pool": self.graphs.pool(), "stream": self.graphs.side}
        with torch.cuda.graph(graph, **place, capture_error_mode="thread_local"):
            function()
        self.captured = graph
        self.graphs.captured.add(self)
