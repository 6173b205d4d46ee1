"""Updates: text into the memory, in chunks of at most 512 tokens; and the write into the pools alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.shapes import Work, projected
from benchmarks.timing import Contender
from memkernel import cuda, huge_pages, ops, reference
from memkernel.engine import CHUNK_TOKENS, Engine

WRITERS = ["memkernel", "cuda c++", "reference", "published", "copy and ranks"]
COPIES = 12  # of a case's pools that are held at the most: to start from, of each contender, and to compare


def update_case(lab: Lab, T: int) -> Case:
    config, document = lab.config, lab.ids(T)
    chunks = document.split(CHUNK_TOKENS)
    dropped = lab.dropped(len(chunks))
    new_rows = len(chunks) * config.write_rows

    def by_age(key: Tensor, value: Tensor) -> list[Tensor]:
        """The rows that the update wrote, and those that it left, apart: an error in few rows must show."""
        rows = torch.stack([key, value])
        return [rows[:, :, -new_rows:], rows[:, :, :-new_rows]]

    def engine_contender(shared: Engine) -> Contender:
        engine = Engine(shared.model, shared.memory.fork(), shared.folder)

        def output() -> list[Tensor]:
            checked = Engine(shared.model, shared.memory.fork(), shared.folder)
            for chunk, ranks in zip(chunks, dropped, strict=True):
                checked.update(chunk, dropped=ranks)
            slots = checked.memory.rank.long().argsort(1)
            layer = torch.arange(config.num_layers, device=slots.device)[:, None]
            return by_age(checked.memory.key[layer, slots], checked.memory.value[layer, slots])

        return Contender(call=lambda: engine.update(document), output=output)

    def published() -> Contender:
        rival = lab.published()

        def call() -> None:
            for chunk in chunks:
                rival.update(chunk)

        def output() -> list[Tensor]:
            checked = lab.published()
            for chunk, ranks in zip(chunks, dropped, strict=True):
                checked.update(chunk, ranks)
            return by_age(*projected(lab.engine.model, checked.memory))

        return Contender(call, output)

    work = Work()
    for chunk in chunks:
        work = work + lab.least.inject(len(chunk)) + lab.least.write(config.memory_rows)
    return Case(
        builders={
            "memkernel": lambda: engine_contender(lab.engine),
            "published": published,
            "reference": lambda: engine_contender(lab.reference),
        },
        truth=("published", "reference"),
        bound=lab.model_bound,
        work=work,
    )


@pytest.mark.parametrize("contender", ["memkernel", "reference", "published"])
@pytest.mark.parametrize("T", [16, 64, 256, 512, 2048], ids="T{}".format)
def bench_update(race, contender, T):
    race("update", {"T": T}, contender, lambda lab: update_case(lab, T))


def write_case(lab: Lab, M: int) -> Case:
    """Draw W ranks a layer, forget those rows and write new ones, in pools of M rows."""
    config = lab.config
    L, W, shape = config.num_layers, config.write_rows, (config.num_kv_heads, config.head_size)
    on_gpu = lab.device.type == "cuda"
    taken = COPIES * L * M * lab.least.row
    if on_gpu and taken > torch.cuda.mem_get_info(lab.device)[0]:
        return Case.nobody(WRITERS, f"would take {taken / 1e9:.0f} GB")
    state = torch.tensor([7, 3], device=lab.device)
    pools, rows = ([lab.random(L, n, *shape, seed=seed + i) for i in (0, 1)] for n, seed in ((M, 2), (W, 4)))
    oldest_first = torch.arange(M, dtype=torch.int32, device=lab.device).repeat(L, 1)
    dropped = reference.draw_ranks(state, L, M, W, False)

    def contender(write: Callable) -> Contender:
        mine, rank = [huge_pages.copy(pool, lab.device) for pool in pools], oldest_first.clone()

        def output() -> list[Tensor]:
            checked, ranks = [pool.clone() for pool in pools], oldest_first.clone()
            write(checked, ranks)
            slots, layer = ranks.long().argsort(1), torch.arange(L, device=lab.device)[:, None]
            return [pool[layer, slots] for pool in checked]

        return Contender(lambda: write(mine, rank), output)

    def published() -> Contender:
        rival = lab.published()
        rival.memory.data = lab.random(L, M, config.hidden_size)
        delta = lab.random(L, W, config.hidden_size, seed=1)
        return Contender(call=lambda: rival.write(delta), output=kept_and_appended)

    def kept_and_appended() -> list[Tensor]:
        """What the published code makes of the same rows; it holds one pool, of rows of any width."""
        checked = lab.published()
        checked.memory.data = torch.cat([pool.flatten(2) for pool in pools], dim=-1)
        checked.write(torch.cat([new.flatten(2) for new in rows], dim=-1), dropped)
        return [pool.unflatten(-1, shape) for pool in checked.memory.data.chunk(2, dim=-1)]

    def write_with_ops(namespace):
        def write(into: list[Tensor], rank: Tensor) -> None:
            namespace.memory_write_(into, rank, rows, namespace.draw_ranks(state, L, M, W, False))

        return lambda: contender(write)

    def write_in_one_launch(into: list[Tensor], rank: Tensor) -> None:
        cuda.draw_and_write_(into, rank, rows, state, False)

    def copy_and_ranks() -> Contender:
        """No rival but a floor: as many bytes copied to one place of each pool, and the ranks closed. What it leaves is
        no memory, so that there is nothing to compare."""
        mine, rank = [huge_pages.copy(pool, lab.device) for pool in pools], oldest_first.clone()

        def call() -> None:
            for pool, new in zip(mine, rows, strict=True):
                pool[:, :W] = new
            ops.memory_write_([], rank, [], dropped)

        return Contender(call, output=kept_and_appended)

    return Case(
        builders={
            "memkernel": write_with_ops(ops),
            "cuda c++": lambda: contender(write_in_one_launch),
            "reference": write_with_ops(reference),
            "published": published,
            "copy and ranks": copy_and_ranks,
        },
        unavailable={"cuda c++": cuda.WHY_NOT or "needs a CUDA device"} if cuda.WHY_NOT or not on_gpu else {},
        truth=kept_and_appended(),
        bound=0.0,
        work=lab.least.write(M),
        cold=True,
    )


@pytest.mark.parametrize("contender", WRITERS)
@pytest.mark.parametrize("M", [1600, 6400, 12800, 25600, 102400], ids="M{}".format)
def bench_write(race, contender, M):
    race("write", {"M": M}, contender, lambda lab: write_case(lab, M))
