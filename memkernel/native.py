"""The CPU kernels: the extension `memkernel._C`, built from csrc/ on installation. Importing it registers them.

It is optional: without it the same ops run as plain PyTorch (`memkernel.reference`).

The same call repeats bit for bit with the same number of threads and instruction set. With another number of threads
two ops may differ by rounding, and no others: attention, since where heads and queries are few its keys are divided
among threads and the parts merged, and `linear` of more than 32 rows, since whether PyTorch multiplies them depends on
how many rows of the weight a thread gets. Instruction sets round differently.
"""

from importlib.util import find_spec
from pathlib import Path

import torch  # noqa: F401 - loads the libraries that the extension is linked to


def why_not(extension: str, error: ImportError, needs: str) -> str:
    """Why this extension of the package cannot be imported, in words for users."""
    if find_spec(f"memkernel.{extension}"):
        return f"the extension failed to load: {error}"
    reason = Path(__file__).with_name(f"{extension}.failed.txt")  # setup.py leaves it
    if reason.exists():
        needs = f"{reason.read_text('utf-8', 'replace').strip()} (`pip install -v` shows more)"
    return f"the extension was not built: {needs}"


WHY_NOT = None  # why there are no kernels
try:
    from memkernel import _C
except ImportError as error:
    _C, WHY_NOT = None, why_not("_C", error, "installing memkernel does that")


def isas() -> list[str]:
    """The instruction sets that kernels exist for on this machine, slowest first; none without the extension."""
    return _C.isas() if _C else []


def isa() -> str | None:
    """The instruction set in use, at first the last of `isas()`."""
    return _C.isa() if _C else None


def set_isa(name: str) -> None:
    """Use the kernels for another of `isas()`, in the whole process: for tests and comparisons."""
    if name not in isas():
        raise ValueError(f"isa: expected one of {isas()}, got {name!r}")
    _C.set_isa(name)
