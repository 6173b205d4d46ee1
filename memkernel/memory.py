"""The memory: per layer M rows that every reader attends to, rewritten in place a random W at a time.

A row lives in a slot from its writing to its dropping; its place in age order is `rank`, an integer. Readers need a
row's projected key and value, writers only the newest W rows as hidden states, so nothing else is kept unless asked.
All tensors keep their addresses for the life of the object.
"""

import contextlib
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memkernel import huge_pages, memory_file
from memkernel._check import expect
from memkernel.config import ModelConfig
from memkernel.devices import find_device

DRAWS = ("counter", "published")


def call(function: Callable[[], None]) -> None:
    function()


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed!r}")
    return seed


@dataclass
class Delta:
    """R new rows a layer, oldest first: what `Llama.inject` returns and `Memory.write` takes. One dtype and device."""

    key: Tensor  # [L, R, G, D] un-rotated, through the read weights
    value: Tensor  # [L, R, G, D]
    hidden: Tensor  # [L, R, E]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, like: Tensor) -> "Delta":
        """Uninitialised, in the dtype and on the device of `like`."""
        L, G, D, E = config.num_layers, config.num_kv_heads, config.head_size, config.hidden_size
        shapes = (L, rows, G, D), (L, rows, G, D), (L, rows, E)
        return cls(*(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes))


class Memory:
    """One memory of one model.

    Attributes:
        key, value: [L, M, G, D] by slot, the model's dtype; keys un-rotated.
        rotated_key: [L, M, G, D], `key` rotated to each row's position; valid after `refresh`.
        rank: [L, M] int32 by slot; 0 is the oldest row, M - 1 the newest.
        recent: [L, W, E], the W newest rows as hidden states, oldest first.
        hidden_by_slot: [L, M, E], or None unless `keep_hidden`.
        edits: how often this object changed, by whatever means.
        step: updates so far. seed: of the draw. initialized: False until the first update fills the pool.
        state: [2] int64, seed and step where the draw reads them, so that an update needs nothing from the host.
    """

    def __init__(
        self,
        config: ModelConfig,
        fingerprint: str,
        ops,
        dtype: torch.dtype,
        device: torch.device,
        keep_hidden: bool = False,
        seed: int = 0,
        draw: str = "counter",
    ):
        """An empty memory for the model with this `fingerprint`. `draw` is "counter" (a pure function of seed, step and
        layer, the same on every device) or "published" (torch.randperm on the CPU's default generator, one call per
        layer in layer order, or one in all, as the published implementation draws)."""
        if draw not in DRAWS:
            raise ValueError(f"draw: expected one of {DRAWS}, got {draw!r}")
        self.config, self.fingerprint, self.ops, self.draw = config, fingerprint, ops, draw
        self.seed = _check_seed(seed)
        L, M, W, E = config.num_layers, config.memory_rows, config.write_rows, config.hidden_size
        like = {"dtype": dtype, "device": device}
        rows = (L, M, config.num_kv_heads, config.head_size)
        self.key, self.value, self.rotated_key = (huge_pages.empty(rows, **like).zero_() for _ in range(3))
        self.rank = torch.arange(M, dtype=torch.int32, device=device).repeat(L, 1)
        self.recent = torch.zeros(L, W, E, **like)
        self.hidden_by_slot = huge_pages.empty((L, M, E), **like).zero_() if keep_hidden else None
        self.step, self.initialized, self.edits = 0, False, 0
        self.state = torch.tensor([seed, 0], device=device)
        self._rotation_is_stale = True

    # -- updating -----------------------------------------------------------------------------------------------------

    def write(self, delta: Delta, dropped: Tensor | None = None, run: Callable[[Callable], None] = call) -> None:
        """Take in the R rows of `delta`. The first write fills the pool with copies of them; each later one drops R
        rows a layer at random and appends them. Wrong arguments and Ctrl-C leave the memory as it was.

        Args:
            delta: R rows; R >= W, or any R >= 1 while not initialized or if hidden states are kept; R <= M once
                initialized.
            dropped: [L, R] integers, the ranks to drop instead of drawing; distinct within a layer.
            run: called with the device's work of a drawn drop, a function of no arguments which waits for nothing and
                touches nothing of the host's; a captured graph of the same work may be replayed instead.
        Raises: ValueError naming the argument; rows that are not finite are refused.
        """
        rows = self._check_delta(delta)
        if not self.initialized:
            if dropped is not None:
                raise ValueError("dropped: expected None, the first update fills the pool and drops nothing")
            with _uninterrupted():
                self._fill(delta)
            return
        if dropped is not None or self.draw == "published":
            dropped, run = self._check_dropped(dropped, rows) if dropped is not None else self._randperm(rows), call
        with _uninterrupted():
            self._rotation_is_stale = True  # also if the write fails
            run(lambda: self._replace(delta, dropped))
            self.step += 1
            self._note_edit()

    def _replace(self, delta: Delta, dropped: Tensor | None) -> None:
        """Draw, unless told what to drop, and write."""
        if dropped is None:
            (L, M), rows, shared = self.rank.shape, delta.hidden.shape[1], not self.config.drop_per_layer
            dropped = self.ops.draw_ranks(self.state, L, M, rows, shared)
        news = [delta.key, delta.value] if self.hidden_by_slot is None else [delta.key, delta.value, delta.hidden]
        recent = self._recent_after(delta.hidden, dropped)
        self.ops.memory_write_(self._pools(), self.rank, news, dropped)
        self.recent.copy_(recent)
        self.state[1].add_(1)

    def _recent_after(self, new: Tensor, dropped: Tensor) -> Tensor:
        """The W newest rows once `new` [L, R, E] is written: fewer than W are preceded by the newest survivors."""
        (L, M), (W, E), rows = self.rank.shape, self.recent.shape[1:], new.shape[1]
        if rows >= W:
            return new[:, -W:]
        survives = torch.ones_like(self.rank, dtype=torch.bool).scatter_(1, dropped.long(), False)
        ranks = survives.nonzero()[:, 1].view(L, M - rows)[:, rows - W :]  # of the W - R newest survivors
        slots = self.rank.long().argsort(1).gather(1, ranks)
        old = self.hidden_by_slot.gather(1, slots[..., None].expand(-1, -1, E))
        return torch.cat([old, new], dim=1)

    def _pools(self) -> list[Tensor]:
        return [self.key, self.value] + ([] if self.hidden_by_slot is None else [self.hidden_by_slot])

    def _fill(self, delta: Delta) -> None:
        """The pool becomes `delta` repeated whole as often as it fits, then its last rows."""
        M, W, rows = self.config.memory_rows, self.config.write_rows, delta.hidden.shape[1]
        index = torch.arange(M, device=self.key.device)
        whole = M // rows * rows
        index = torch.where(index < whole, index % rows, index - M + rows) if whole else index + rows - M
        for pool, new in zip(self._pools(), (delta.key, delta.value, delta.hidden), strict=False):
            torch.index_select(new, 1, index, out=pool)
        self.rank.copy_(torch.arange(M, dtype=torch.int32))
        torch.index_select(delta.hidden, 1, index[-W:], out=self.recent)
        self.initialized = True
        self.step += 1
        self.state[1].add_(1)
        self._note_edit()

    def _note_edit(self) -> None:
        self.edits += 1
        self._rotation_is_stale = True

    def _randperm(self, count: int) -> Tensor:
        """[L, count] int32 ranks to drop, drawn as the published implementation draws them."""
        L, M = self.rank.shape
        draws = torch.stack([torch.randperm(M)[M - count :] for _ in range(L if self.config.drop_per_layer else 1)])
        return draws.expand(L, count).to(self.key.device, torch.int32)

    def _check_delta(self, delta: Delta) -> int:
        L, M, G, D = self.key.shape
        W, E = self.recent.shape[1:]
        rows = delta.hidden.shape[1] if delta.hidden.ndim == 3 else -1
        like = (self.key.dtype, self.key.device)
        expect("delta.hidden", delta.hidden, (L, rows, E), *like)
        expect("delta.key", delta.key, (L, rows, G, D), *like)
        expect("delta.value", delta.value, (L, rows, G, D), *like)
        least = W if self.initialized and self.hidden_by_slot is None else 1
        if rows < least or (self.initialized and rows > M):
            raise ValueError(f"delta: expected {least} to {M} rows a layer, got {rows}")
        names = ("hidden", "key", "value")
        extremes = torch.stack([end for name in names for end in torch.aminmax(getattr(delta, name))])
        for name, finite in zip(names, extremes.isfinite().view(3, 2).all(1).tolist(), strict=True):
            if not finite:
                raise ValueError(f"delta.{name}: expected finite numbers, got NaN or infinity; the memory is unchanged")
        return rows

    def _check_dropped(self, dropped: Tensor, count: int) -> Tensor:
        L, M = self.rank.shape
        if not isinstance(dropped, Tensor) or dropped.dtype not in (torch.int32, torch.int64):
            came = dropped.dtype if isinstance(dropped, Tensor) else type(dropped).__name__
            raise ValueError(f"dropped: expected an int64 or int32 tensor, got {came}")
        if dropped.shape != (L, count):
            raise ValueError(f"dropped: expected shape {[L, count]}, got {list(dropped.shape)}")
        ordered = dropped.sort(dim=1).values
        if ordered.min() < 0 or ordered.max() >= M or (ordered.diff(dim=1) == 0).any():
            raise ValueError(f"dropped: expected distinct ranks in [0, {M}) in each layer, got others")
        return dropped.to(self.rank.device, torch.int32)

    # -- reading ------------------------------------------------------------------------------------------------------

    def refresh(self, cos: Tensor, sin: Tensor, offset: int) -> None:
        """Bring `rotated_key` up to date: the row of rank r stands at position offset + r. Free if nothing changed."""
        if self._rotation_is_stale:
            self.ops.rotate_memory_(self.rotated_key, self.key, self.rank, cos, sin, offset)
            self._rotation_is_stale = False

    def hidden(self) -> Tensor:
        """The pool as hidden states, oldest row first: a new [L, M, E] tensor. Needs keep_hidden=True."""
        if self.hidden_by_slot is None:
            raise ValueError("hidden: expected a memory made with keep_hidden=True, got one without hidden states")
        return torch.empty_like(self.hidden_by_slot).scatter_(
            1, self.rank.long()[..., None].expand_as(self.hidden_by_slot), self.hidden_by_slot
        )

    # -- whole memories -----------------------------------------------------------------------------------------------

    def fork(self) -> "Memory":
        """An independent copy: later updates of either leave the other alone."""
        return self._copy(self.key.device)

    def to(self, device: str | torch.device) -> "Memory":
        """This memory if it is on `device`, else a copy of it there: memories can be kept on the CPU, and brought in to
        be read and updated."""
        device = find_device(device)
        return self if device == self.key.device else self._copy(device)

    def _copy(self, device: torch.device) -> "Memory":
        with torch.inference_mode(False):
            other = Memory.__new__(Memory)
            parts = self.__dict__.items()
            other.__dict__ = {k: huge_pages.copy(v, device) if isinstance(v, Tensor) else v for k, v in parts}
        return other

    def reseed(self, seed: int) -> None:
        """Go on drawing with another seed, so that copies of one memory drop different rows."""
        self.seed = _check_seed(seed)
        self.state[0] = seed

    def reset(self) -> None:
        """Forget everything: not initialized, step 0. Readers see a plain Llama until an update fills the pool."""
        with _uninterrupted():
            self.step, self.initialized = 0, False
            self._note_edit()
            self.state.copy_(torch.tensor([self.seed, 0]))
            for tensor in (self.key, self.value, self.rotated_key, self.recent, self.hidden_by_slot):
                if tensor is not None:
                    tensor.zero_()
            self.rank.copy_(torch.arange(self.rank.shape[1], dtype=torch.int32))

    def save(self, path: str | Path) -> None:
        """Write the memory to one file. Whatever interrupts it, `path` holds the old file or the new one, whole."""
        memory_file.save(path, self._state(), self._metadata())

    def load(self, path: str | Path) -> None:
        """Replace this memory by a saved one, in place; seed, step and the way of drawing continue as saved.

        Raises ValueError, and leaves the memory as it was, if the file is truncated or altered, belongs to another
        model, or holds anything but finite numbers. Saved hidden states are read if this memory keeps them.
        """
        tensors, saved = memory_file.load(path)
        state, expected = self._state(), self._metadata()
        for field in ("fingerprint", "layers", "rows", "write_rows"):
            if saved.get(field) != expected[field]:
                raise ValueError(f"{path}: {field}: expected {expected[field]!r}, got {saved.get(field)!r}")
        for field, allowed in (("draw", DRAWS), ("initialized", ("0", "1"))):
            if saved.get(field) not in allowed:
                raise ValueError(f"{path}: {field}: expected one of {allowed}, got {saved.get(field)!r}")
        for field in ("step", "seed"):
            if not saved.get(field, "").isdecimal() or int(saved[field]) >= 1 << 63:
                raise ValueError(f"{path}: {field}: expected an integer in [0, 2^63), got {saved.get(field)!r}")
        for name, mine in state.items():
            if name not in tensors:
                hint = "was it saved without keep_hidden=True?"
                raise ValueError(f"{path}: expected a tensor {name!r} ({hint}), found none")
            tensors[name] = _check_loaded(f"{path}: {name}", tensors[name], mine)
        with _uninterrupted():
            self._note_edit()
            for name, mine in state.items():
                mine.copy_(tensors[name])
            self.seed, self.step, self.draw = int(saved["seed"]), int(saved["step"]), saved["draw"]
            self.state.copy_(torch.tensor([self.seed, self.step]))
            self.initialized = saved["initialized"] == "1"

    def _state(self) -> dict[str, Tensor]:
        state = {"key": self.key, "value": self.value, "rank": self.rank, "recent": self.recent}
        return state if self.hidden_by_slot is None else state | {"hidden": self.hidden_by_slot}

    def _metadata(self) -> dict[str, str]:
        config = self.config
        numbers = {"layers": config.num_layers, "rows": config.memory_rows, "write_rows": config.write_rows}
        numbers |= {"step": self.step, "seed": self.seed, "initialized": int(self.initialized)}
        return {"fingerprint": self.fingerprint, "draw": self.draw} | {k: str(v) for k, v in numbers.items()}


def _check_loaded(name: str, tensor: Tensor, mine: Tensor) -> Tensor:
    """A tensor of a memory file, in the dtype of the one it replaces; floats may have been saved in another."""
    same_kind = tensor.is_floating_point() and mine.is_floating_point()
    expect(name, tensor, mine.shape, tensor.dtype if same_kind else mine.dtype, torch.device("cpu"))
    if not same_kind:
        if not torch.equal(tensor.sort(1).values, torch.arange(mine.shape[1], dtype=mine.dtype).expand_as(tensor)):
            raise ValueError(f"{name}: expected a permutation of the rows in each layer, got none")
        return tensor
    tensor = tensor.to(mine.dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers in {mine.dtype}, got NaN or infinity")
    return tensor


@contextlib.contextmanager
def _uninterrupted():
    """Hold back Ctrl-C until the block is done: what it guards is short and must happen whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    pending = []
    previous = signal.getsignal(signal.SIGINT)
    if previous is None:  # a handler that Python did not install, and cannot put back
        yield
        return
    signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            signal.raise_signal(signal.SIGINT)
