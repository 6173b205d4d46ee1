"""csrc/cuda/memory_write.cu: compiled for GPUs that are not there, run on host threads, and on a GPU where one is."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from memkernel import cuda, reference
from tests.cases import SENTINEL, permutations

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "csrc/cuda/memory_write.cu"
needs_kernel = pytest.mark.skipif(
    bool(cuda.WHY_NOT) or not torch.cuda.is_available(), reason=cuda.WHY_NOT or "needs a CUDA device"
)
HALF, BYTES, FLOAT, EMPTY = ((2, 8), torch.bfloat16), ((3,), torch.int8), ((33,), torch.float32), ((0,), torch.float32)
CASES = {  # L, M, W, shared, pools
    "one-row": (1, 1, 1, False, [HALF]),
    "two-rows": (2, 2, 1, False, [BYTES]),
    "all": (2, 40, 40, False, [HALF, HALF]),
    "nothing": (2, 40, 0, False, [HALF]),
    "ragged": (3, 645, 33, False, [HALF, BYTES, FLOAT]),
    "shared-draw": (2, 641, 7, True, [HALF, EMPTY]),
    "12801-rows": (1, 12801, 256, False, [HALF]),
    "131072-rows": (1, 131072, 2621, False, [BYTES]),
}


def tensors(L, M, W, pools, device="cpu"):
    """Buffers of pools with sentinels around the M rows, new rows, ranks."""
    wholes = [torch.full((L, M + 2, *shape), SENTINEL, dtype=dtype) for shape, dtype in pools]
    for whole in wholes:
        whole[:, 1:-1] = torch.randint(100, whole[:, 1:-1].shape).to(whole.dtype)
    rows = [torch.randint(100, (L, W, *shape)).to(dtype) for shape, dtype in pools]
    return wholes, rows, permutations(L, M)


def assert_writes_what_the_reference_writes(write, device, L, M, W, shared, pools):
    wholes, rows, rank = tensors(L, M, W, pools)
    mine, my_rank = [whole.to(device, copy=True) for whole in wholes], rank.to(device, copy=True)
    for step in range(2):
        state = torch.tensor([2**40 + 3, step])
        write([whole[:, 1:-1] for whole in mine], my_rank, [new.to(device) for new in rows], state.to(device), shared)
        dropped = reference.draw_ranks(state, L, M, W, shared)
        reference.memory_write_([whole[:, 1:-1] for whole in wholes], rank, rows, dropped)
        assert torch.equal(my_rank.cpu(), rank)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, wholes, strict=True))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_warnings_or_spills(architecture, tmp_path):
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-arch={architecture}",
        *strict,
        SOURCE,
        "-o",
        tmp_path / "cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    print(f"{architecture}: registers {registers}")
    assert kernels == [("0", "0", "0")] * 2  # rows of 16-byte words, rows of bytes
    assert max(registers) <= 40, "six blocks of 256 threads no longer fit a processor's 65,536 registers"


class Pool(ctypes.Structure):
    _fields_ = [("pool", ctypes.c_void_p), ("rows", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("row_bytes", "pool_L", "pool_M", "rows_L", "rows_W")]


class DrawAndWrite(ctypes.Structure):
    _fields_ = [("pools", Pool * 3), ("count", ctypes.c_int), ("rank", ctypes.c_void_p), ("state", ctypes.c_void_p)]
    _fields_ += [("rank_L", ctypes.c_int64), ("state_stride", ctypes.c_int64)]
    _fields_ += [("L", ctypes.c_int), ("M", ctypes.c_int), ("W", ctypes.c_int), ("shared", ctypes.c_bool)]


@pytest.fixture(scope="module")
def compile_for_threads(tmp_path_factory):
    probe = ["g++", "-std=c++20", "-fsyntax-only", "-include", "barrier", "-x", "c++", "/dev/null"]
    if not shutil.which("g++") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs a g++ with C++20's barriers")

    def compile(source, *flags):
        output = tmp_path_factory.mktemp("cuda") / source.stem
        command = ["g++", "-std=c++20", "-O1", "-pthread", *flags, "-x", "c++", source, "-o", output]
        subprocess.run(command, check=True, capture_output=True)
        return output

    return compile


@pytest.fixture(scope="module")
def on_threads(compile_for_threads):
    """The launcher, compiled for host threads."""
    library = compile_for_threads(SOURCE, "-shared", "-fPIC", "-include", TESTS / "cuda_on_threads.h")
    launch = ctypes.CDLL(library).memkernel_draw_and_write

    def write(pools, rank, rows, state, shared):
        args = DrawAndWrite(count=len(pools), rank=rank.data_ptr(), state=state.data_ptr(), rank_L=rank.stride(0))
        args.state_stride, (args.L, args.M), args.W, args.shared = 1, rank.shape, rows[0].shape[1], shared
        for i, (pool, new) in enumerate(zip(pools, rows, strict=True)):
            size = pool.element_size()
            strides = [stride * size for stride in (*pool.stride()[:2], *new.stride()[:2])]
            args.pools[i] = Pool(pool.data_ptr(), new.data_ptr(), pool[0, 0].numel() * size, *strides)
        return launch(ctypes.byref(args), None)

    return write


@pytest.mark.parametrize("name", [name for name in CASES if name != "131072-rows"])  # a minute of barriers
def test_on_host_threads(on_threads, name):
    assert_writes_what_the_reference_writes(on_threads, "cpu", *CASES[name])


@pytest.mark.parametrize("barrier", [None, 0, 1, 2, 3, 4])
def test_has_no_races_and_no_barrier_too_many(compile_for_threads, barrier, tmp_path):
    """ThreadSanitizer is content with the kernel, and with no version that lacks one of its barriers."""
    parts = SOURCE.read_text().split("  __syncthreads();\n")
    assert len(parts) == 6
    if barrier is not None:
        parts[barrier : barrier + 2] = [parts[barrier] + parts[barrier + 1]]
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "csrc/cuda/memory_write.cu").write_text("  __syncthreads();\n".join(parts))
    for file in (SOURCE.with_suffix(".h"), TESTS / "cuda_on_threads.h", TESTS / "cuda_races.cpp"):
        shutil.copy(file, tmp_path / file.relative_to(TESTS.parent))
    program = compile_for_threads(tmp_path / "tests/cuda_races.cpp", "-fsanitize=thread", "-g")
    at_first = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}  # what is read too early may make a search endless
    done = subprocess.run([program], capture_output=True, text=True, env=at_first, timeout=300)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {done.stderr}")
    assert ("WARNING: ThreadSanitizer: data race" in done.stderr) == (barrier is not None), done.stderr
    assert done.returncode == (0 if barrier is None else 66)


def test_refuses_what_does_not_fit_a_block(on_threads):
    """131,072 rows of which 2% are drawn do; of 25% drawn nothing is written."""
    pool, rank = torch.zeros(1, 131072, 1), torch.arange(131072, dtype=torch.int32)[None]
    assert on_threads([pool], rank, [torch.ones(1, 32768, 1)], torch.tensor([0, 0]), False) == -1
    assert not pool.any()


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name):
    assert_writes_what_the_reference_writes(cuda.draw_and_write_, "cuda", *CASES[name])


@needs_kernel
def test_on_a_device_what_the_kernel_does_not_take():
    """More than three pools; a draw too large for a block."""
    assert_writes_what_the_reference_writes(cuda.draw_and_write_, "cuda", 2, 40, 7, False, [HALF] * 4)
    assert_writes_what_the_reference_writes(cuda.draw_and_write_, "cuda", 1, 20000, 15000, False, [BYTES])


def test_without_the_extension_the_error_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "WHY_NOT", "because")
    with pytest.raises(RuntimeError, match="draw_and_write_: because"):
        cuda.draw_and_write_([], torch.zeros(0), [], torch.zeros(2), False)
