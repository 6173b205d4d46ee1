"""Find the attention kernels' tiles for the GPU at hand, and write them into its rows of memkernel/kernels/tiles.py.

    python -m benchmarks.tune_attention [--head-size 128] [--kind prefill] [--write]
    python -m benchmarks.tune_attention --dry-run --arch sm_90      without a GPU: compile the candidates, time nothing

Every candidate is first held to the reference, then timed with a cold second-level cache. Those of prefill are ranked
by the sum over prompts of their time a token, those of decoding by their time for one step.
"""

import argparse
import contextlib
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks.timing import Clock
from memkernel import reference
from memkernel.kernels import tiles
from memkernel.kernels.memory_attention import memory_attention
from memkernel.kernels.tiles import Tile

MEMORY_ROWS, HEADS, KV_HEADS = 12800, 32, 8
OWN_ROWS = 2048
PROMPTS = (128, 512, 2048)
PREFILL = [
    (64, 64, 4, 2, 2),
    (64, 64, 4, 3, 2),
    (64, 128, 4, 2, 1),
    (128, 32, 4, 2, 1),
    (128, 32, 8, 3, 1),
    (128, 64, 4, 3, 1),
    (128, 64, 8, 3, 1),
    (128, 64, 8, 4, 1),
    (128, 128, 8, 2, 1),
    (128, 128, 8, 3, 1),
]
DECODE = [(32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3)]
REPEATS = 50
TOLERANCE = 1e-2  # relative error in bfloat16; a wrong tile is not near


def candidates(kind: str | int, compiled_alike: bool = False) -> list[Tile]:
    """Tiles to try; with `compiled_alike`, one of those that differ in the number of programs only."""
    if kind == "prefill":
        return [Tile(*numbers) for numbers in PREFILL]
    programs = (1,) if compiled_alike else (1, 2, 3)
    return [Tile(kind, *numbers, n) for numbers in DECODE for n in programs]


def workloads(kind: str | int, head_size: int, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Arguments of `memory_attention` that take this kind of tile, in the heads of Llama-3-8B."""
    batches = [(1, T) for T in PROMPTS] if kind == "prefill" else [(kind * KV_HEADS // HEADS, 1)]
    like = {"dtype": torch.bfloat16, "device": device}
    calls = []
    for B, T in batches:
        memory = [torch.randn(1, MEMORY_ROWS, KV_HEADS, head_size, **like) for _ in range(2)]
        own = [torch.randn(B, OWN_ROWS, KV_HEADS, head_size, **like) for _ in range(2)]
        start = torch.zeros(B, dtype=torch.int32, device=device)
        calls.append((torch.randn(B, T, HEADS, head_size, **like), *memory, *own, start))
    return calls


@contextlib.contextmanager
def in_table(family: str, head_size: int, kind: str | int, tile: Tile) -> Iterator[None]:
    row, index = tiles.TILES[family][head_size], tiles.KINDS.index(kind)
    saved, row[index] = row[index], tile
    try:
        yield
    finally:
        row[index] = saved


def microseconds(call: tuple[torch.Tensor, ...], truth: torch.Tensor) -> float:
    """Median time of a call a token, infinite where the tile does not run or computes something else."""
    try:
        out = memory_attention(*call).float()
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(f"  does not run: {error}")
        return math.inf
    if not (out - truth).norm() < TOLERANCE * truth.norm():
        print("  differs from the reference")
        return math.inf
    clock, again = Clock(truth.device), lambda: memory_attention(*call)
    return 1e6 * statistics.median(clock.seconds(again, cold=True)[1] for _ in range(REPEATS)) / call[0].shape[1]


def tune(family: str, head_size: int, kind: str | int) -> Tile:
    """The fastest candidate, all of them printed."""
    calls = workloads(kind, head_size, "cuda")
    truths = [reference.memory_attention(*(t.float() if t.is_floating_point() else t for t in call)) for call in calls]
    times = {}
    for tile in candidates(kind):
        with in_table(family, head_size, kind, tile):
            each = [microseconds(call, truth) for call, truth in zip(calls, truths, strict=True)]
        times[tile] = sum(each)
        print(f"{family} D{head_size} {kind}: {tuple(tile)}  " + "  ".join(f"{t:.2f} us a token" for t in each))
    return min(times, key=times.get)


def rewrite(source: str, family: str, head_size: int, row: list[Tile]) -> str:
    """The text of tiles.py with another row for this family and head size."""
    pattern = rf'(    "{family}": {{\n(?:        .*\n)*?        {head_size}: ).*'
    text, found = re.subn(pattern, lambda match: f"{match.group(1)}{[tuple(tile) for tile in row]},", source)
    if found != 1:
        raise ValueError(f"tiles.py: expected one row {head_size} of {family}, found {found}")
    return text


def dry_run(arch: str, head_sizes: list[int], kinds: list[str | int]) -> int:
    """Compile every candidate for a chip that is not there; which of them could be shipped?"""
    from tests.compile_kernels import ARCHES, Compiled, compile_cases

    def fits(row: Compiled) -> bool:
        return not row.error and not row.spills and row.shared <= ARCHES[arch].shared

    count = 0
    for head_size, kind in ((d, k) for d in head_sizes for k in kinds):
        call = workloads(kind, head_size, "meta")[-1]
        for tile in candidates(kind, compiled_alike=True):
            with in_table(arch, head_size, kind, tile):
                rows = compile_cases({"": lambda call=call: memory_attention(*call)}, arch)
            kernel = rows[0]
            verdict = "fits" if all(map(fits, rows)) else f"does not fit {kernel.error}"
            print(
                f"{arch} D{head_size} {kind}: {tuple(tile)}  {kernel.registers} registers, {kernel.spills} spills, "
                f"{kernel.shared / 1024:.0f} KB: {verdict}"
            )
            count += all(map(fits, rows))
    print(f"dry run: {count} candidates fit; nothing timed, nothing written")
    return int(count == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-size", type=int, action="append", choices=[64, 128], help="may be repeated")
    parser.add_argument("--kind", action="append", choices=[str(kind) for kind in tiles.KINDS], help="may be repeated")
    parser.add_argument("--write", action="store_true", help="write the fastest tiles into tiles.py")
    parser.add_argument("--dry-run", action="store_true", help="compile only, for --arch; needs no GPU")
    parser.add_argument("--arch", default="sm_90", choices=tiles.TILES)
    options = parser.parse_args()
    head_sizes = options.head_size or [64, 128]
    kinds = [kind for kind in tiles.KINDS if not options.kind or str(kind) in options.kind]
    if options.dry_run:
        return dry_run(options.arch, head_sizes, kinds)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, or --dry-run")
    torch.manual_seed(0)
    family, path = tiles.chip(torch.device("cuda", torch.cuda.current_device())).family, Path(tiles.__file__)
    for head_size in head_sizes:
        best = {kind: tune(family, head_size, kind) for kind in kinds}
        row = [
            best.get(kind, Tile(*old)) for kind, old in zip(tiles.KINDS, tiles.TILES[family][head_size], strict=True)
        ]
        print(f"{family} {head_size}: {[tuple(tile) for tile in row]}")
        if options.write:
            path.write_text(rewrite(path.read_text(), family, head_size, row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
