"""Compile every shipped kernel configuration for chips that are not there, and read what came out.

    python -m tests.compile_kernels [--arch sm_90] [--only TEXT] [--json | --markdown]

Each case calls an op on tensors without data (PyTorch's meta device), as a user's call would; where the op launches a
Triton kernel, it is compiled for the chip asked for instead. So it is the launchers' own choice of tiles that is
compiled, with the types and alignments that a call with such tensors has. Needs no GPU; TRITON_INTERPRET must be unset.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from memkernel.kernels import tiles
from tests import shipped_attention, shipped_write

CASES: dict[str, Callable[[], object]] = shipped_attention.CASES | shipped_write.CASES


@dataclass(frozen=True)
class Arch:
    target: GPUTarget
    processors: int
    shared: int  # bytes that one program may have


ARCHES = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 108, 163 << 10),
    "sm_86": Arch(GPUTarget("cuda", 86, 32), 84, 99 << 10),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 132, 227 << 10),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 148, 227 << 10),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 304, 64 << 10),
}
INSTRUCTIONS = {  # name: what it is called in the disassembly
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "tcgen05": r"\bUTC\w*MMA\b",
    "mfma": r"\bv_mfma_",
    "TMA loads": r"\bUTMALDG\.",
    "16-byte async loads": r"\bLDGSTS\.E\.\S*128",
}


@dataclass
class Compiled:
    """One kernel of one case."""

    case: str
    kernel: str
    arch: str
    warps: int = 0
    registers: int = 0
    spills: int = 0  # instructions that move spilled registers; on AMD, spilled vector registers
    shared: int = 0
    instructions: dict[str, int] | None = None
    error: str = ""


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return ARCHES[self.arch].target

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def measure(case: str, arch: str, kernel) -> Compiled:
    """The figures of a compiled kernel, from its machine code."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = _tool("nvdisasm", "-c", file.name)
            registers = int(re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", file.name)).group(1))
        spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    else:
        text = kernel.asm["amdgcn"]
        figures = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
        registers, spills = figures["vgpr_count"], figures["vgpr_spill_count"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    metadata = kernel.metadata
    return Compiled(case, kernel.name, arch, metadata.num_warps, registers, spills, metadata.shared, counts)


def compile_cases(cases: dict[str, Callable[[], object]], arch: str) -> list[Compiled]:
    """Run the cases with every launch compiled for `arch` and not run."""
    rows, run, chip = [], triton.JITFunction.run, tiles.chip
    triton.runtime.driver.set_active(AbsentGPU(arch))
    tiles.chip = lambda device: tiles.Chip(arch, ARCHES[arch].processors)
    for case, call in cases.items():

        def launch(kernel, *args, grid, warmup, case=case, **options):
            rows.append(measure(case, arch, run(kernel, *args, grid=grid, warmup=True, **options)))

        triton.JITFunction.run = launch
        try:
            call()
        except Exception as error:  # a failure of one configuration is a row of the report
            rows.append(Compiled(case, "", arch, error=f"{type(error).__name__}: {error}"[:300]))
        finally:
            triton.JITFunction.run = run
    tiles.chip = chip
    return rows


def markdown(rows: list[Compiled]) -> str:
    """A line per kernel of a case, a column per chip: registers, spills if any, shared KB, tensor core instructions."""
    arches = list(dict.fromkeys(row.arch for row in rows))
    cells = {(row.case, row.kernel, row.arch): row for row in rows}

    def cell(row: Compiled | None) -> str:
        if row is None or row.error:
            return row.error if row else ""
        found = [f"{n} {name}" for name, n in row.instructions.items() if n and "loads" not in name]
        spills = [f"**{row.spills} spills**"] * (row.spills > 0)
        return ", ".join([f"{row.registers} r", *spills, f"{row.shared / 1024:.0f} KB", *found])

    lines = [" | ".join(["| case, kernel", *arches]) + " |", "|" + "---|" * (len(arches) + 1)]
    for case, kernel in dict.fromkeys((row.case, row.kernel) for row in rows):
        figures = [cell(cells.get((case, kernel, arch))) for arch in arches]
        lines.append(" | ".join([f"| {case}, {kernel.removesuffix('_kernel')}", *figures]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHES, help="may be repeated; all by default")
    parser.add_argument("--only", action="append", help="cases whose name contains this text; may be repeated")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET: expected it unset, for interpreted kernels are not compiled")
    cases = {k: v for k, v in CASES.items() if not options.only or any(text in k for text in options.only)}
    rows = [row for arch in options.arch or ARCHES for row in compile_cases(cases, arch)]
    print(json.dumps([asdict(row) for row in rows]) if options.json else markdown(rows))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
