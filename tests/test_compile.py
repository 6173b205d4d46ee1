"""Every shipped Triton configuration compiles for chips that are not there, as tests/compile_kernels.py reads it.

In processes of their own: where there is no GPU, this one interprets kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

ROOT = Path(__file__).parent.parent
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # that one program may have
TENSOR_CORES = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "mfma"}
# Enough to meet every tile of 16-bit numbers once; the whole list is for `python -m tests.compile_kernels`.
ATTENTION = ["bfloat16 D128", "prefill float16 D64", "split float32 D128"]

OTHERS = ["draw 256", "write 8B bfloat16", "norm 4096 bfloat16", "swiglu 14336 bf", "rope 8B", "rotate 8B bf"]


def run(module, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arch", SHARED_KB)
def test_attention_compiles(arch):
    only = [x for text in ATTENTION for x in ("--only", text)]
    done = run("tests.compile_kernels", "--json", "--arch", arch, *only)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    kernels = [row for row in rows if row["kernel"] in ("prefill_kernel", "decode_kernel")]
    assert len(kernels) >= len(ATTENTION)
    for row in rows:
        assert not row["error"] and row["spills"] == 0 and row["shared"] <= SHARED_KB[arch] << 10, row
    for row in kernels:
        instructions = row["instructions"]
        if row["kernel"] == "prefill_kernel" and "float32" not in row["case"]:
            assert instructions[TENSOR_CORES[arch]], row
            loads = {"sm_90": "TMA loads", "sm_100": "TMA loads"}.get(arch, "16-byte async loads")
            assert instructions[loads] or arch == "gfx942", row
        elif arch != "gfx942":
            assert instructions["16-byte async loads"], row
            tensor_cores = instructions["HMMA"] + instructions[TENSOR_CORES[arch]]
            assert tensor_cores or "float32" in row["case"], row


@pytest.mark.parametrize("arch", SHARED_KB)
def test_the_other_kernels_compile(arch):
    done = run("tests.compile_kernels", "--json", "--arch", arch, *[x for text in OTHERS for x in ("--only", text)])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert len({row["kernel"] for row in rows}) == 7
    for row in rows:
        assert not row["error"] and row["spills"] == 0 and row["shared"] <= SHARED_KB[arch] << 10, row


def test_tuning_runs_dry():
    done = run("benchmarks.tune_attention", "--dry-run", "--head-size", "64", "--kind", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing written" in done.stdout


def test_tuning_rewrites_its_row_only():
    from benchmarks.tune_attention import rewrite
    from memkernel.kernels import tiles

    source = Path(tiles.__file__).read_text()
    for family, rows in tiles.TILES.items():
        for head_size, row in rows.items():
            assert rewrite(source, family, head_size, [tiles.Tile(*tile) for tile in row]) == source
            changed = rewrite(source, family, head_size, [tiles.Tile(9, 9, 9, 9, 9)] * 5).splitlines()
            assert sum(a != b for a, b in zip(changed, source.splitlines(), strict=True)) == 1
