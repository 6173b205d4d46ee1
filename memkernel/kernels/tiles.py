"""Which tile an attention kernel uses on which chip: a table, so that no user's first call pays for a search.

`benchmarks/tune_attention.py` measures candidates on a GPU and rewrites that GPU's rows. tests/test_compile.py compiles
every row for its chip: no registers spilled, shared memory within the limit, tensor-core instructions present.
"""

import functools
from typing import NamedTuple

import torch


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. Not Triton's, nor below: those serve kernels too, and cost the host 2 us a call for it."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Tile(NamedTuple):
    """`rows` query rows against `keys` keys at a time; warps of a program, stages of its pipeline of loads, and how
    many programs a processor should be given (more than one hides the start and the end of short ones)."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


class Chip(NamedTuple):
    family: str
    processors: int


KINDS = ("prefill", 16, 32, 64, 128)  # decode tiles by the least power of two that holds the query rows

# float32 is multiplied outside of the tensor cores, exactly: small tiles, the same for all chips.
FLOAT32 = {64: [(16, 16, 4, 2, 1)] * 5, 128: [(32, 16, 4, 2, 1)] * 5}
# family: {head size: 16-bit tiles, one for each of KINDS}. Smaller head sizes use the row of 64.
TILES = {
    "sm_80": {
        64: [(128, 64, 8, 3, 1), (16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (64, 64, 4, 3, 2), (128, 64, 8, 3, 1)],
        128: [(128, 32, 8, 4, 1), (16, 64, 4, 2, 2), (32, 64, 4, 3, 2), (64, 32, 4, 3, 2), (128, 32, 8, 3, 1)],
    },
    "sm_86": {
        64: [(128, 64, 8, 2, 1), (16, 64, 4, 2, 2), (32, 64, 4, 2, 2), (64, 64, 4, 2, 2), (128, 64, 8, 2, 1)],
        128: [(128, 32, 8, 2, 1), (16, 32, 4, 2, 2), (32, 32, 4, 3, 2), (64, 32, 4, 2, 2), (128, 32, 8, 2, 1)],
    },
    "sm_90": {
        64: [(128, 128, 8, 2, 1), (16, 64, 4, 3, 2), (32, 64, 4, 4, 2), (64, 64, 4, 3, 2), (128, 64, 8, 3, 2)],
        128: [(128, 128, 8, 2, 1), (16, 64, 4, 2, 2), (32, 64, 4, 3, 2), (64, 32, 4, 4, 2), (128, 64, 8, 3, 1)],
    },
    "sm_100": {
        64: [(128, 128, 8, 2, 1), (16, 64, 4, 3, 2), (32, 64, 4, 4, 2), (64, 64, 4, 3, 2), (128, 64, 8, 3, 2)],
        128: [(128, 128, 8, 2, 1), (16, 64, 4, 2, 2), (32, 64, 4, 3, 2), (64, 32, 4, 3, 2), (128, 64, 8, 3, 1)],
    },
    "gfx942": {
        64: [(128, 32, 4, 2, 1), (16, 64, 4, 2, 2), (32, 64, 4, 2, 2), (64, 64, 4, 2, 2), (128, 32, 4, 2, 1)],
        128: [(128, 32, 4, 2, 1), (16, 64, 4, 2, 1), (32, 64, 4, 2, 1), (64, 32, 4, 2, 1), (128, 32, 4, 2, 1)],
    },
}
LONGEST_SUM = 2048  # keys
HAS_TMA = ("sm_90", "sm_100")  # tiles loaded by the copy engine


@functools.cache
def chip(device: torch.device) -> Chip:
    """The row of TILES that serves a device, and its number of processors."""
    if device.type != "cuda":  # the interpreter: a few processors, so that keys are split there too
        return Chip("sm_86", 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        return Chip("gfx942", processors)
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return Chip(f"sm_{major}0", processors)
    return Chip("sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86", processors)  # sm_86: the least memory


def tile(family: str, itemsize: int, head_size: int, kind: str | int) -> Tile:
    """The tile for numbers of `itemsize` bytes; `kind` is one of KINDS."""
    table = FLOAT32 if itemsize == 4 else TILES[family]
    return Tile(*table[max(head_size, 64)][KINDS.index(kind)])


def least_splits(keys: int, itemsize: int) -> int:
    """In float32, one sum over 12,800 keys has several times the rounding error of the sum of a few shorter ones."""
    return max(1, cdiv(keys, LONGEST_SUM)) if itemsize == 4 else 1


@functools.lru_cache(4096)
def split_count(programs: int, blocks: int, slots: int, least: int = 1) -> int:
    """In how many parts to share out `blocks` blocks of keys where `programs` programs alone do not fill `slots`.

    The fewest within a tenth of the least time, which is counted in blocks: the longest part, as many times as the
    slots are filled, and 2 blocks for the start and the end of each program. A function of shapes and chip alone.
    """

    def time(splits: int) -> int:
        return cdiv(programs * splits, slots) * (cdiv(blocks, splits) + 2)

    counts = range(least, max(least, min(blocks, 128)) + 1)
    best = min(map(time, counts))
    return next(splits for splits in counts if 10 * time(splits) <= 11 * best)
