"""What a user waits for before the first call: the import, in a process of its own, and loading a checkpoint."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lab import OP_BOUND, Case, Lab
from benchmarks.shapes import Work, projected
from benchmarks.timing import Contender
from memkernel.engine import Engine

LARGEST_FILE = 8e9  # bytes of a checkpoint that a benchmark may write
IMPORTS = {"memkernel": "from memkernel import Engine", "torch": "import torch"}


def import_case(lab: Lab) -> Case:
    def contender(statement: str) -> Contender:
        def call() -> list[Tensor]:
            subprocess.run([sys.executable, "-c", statement], check=True)
            return []  # that it imports is all there is to compare

        return Contender(call)

    return Case(
        builders={name: lambda s=statement: contender(s) for name, statement in IMPORTS.items()},
        truth=[],
        bound=0.0,
        work=Work(),
    )


@pytest.mark.parametrize("contender", list(IMPORTS))
def bench_import(race, contender):
    race("import", {}, contender, import_case)


def load_case(lab: Lab) -> Case:
    """From a file in the page cache to a model and a projected memory on the device. The rival copies the tensors as
    they are and projects the pool layer by layer."""
    names = ("memkernel", "safetensors")
    tensors = lab.published_tensors
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > LARGEST_FILE:
        return Case.nobody(names, f"would write a checkpoint of {size / 1e9:.0f} GB")
    folder = tempfile.TemporaryDirectory()
    path, file = Path(folder.name), Path(folder.name) / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    (path / "config.json").write_text(json.dumps(lab.raw))

    def load() -> Engine:
        return Engine.from_pretrained(path, device=lab.device, dtype=lab.dtype)

    def loaded() -> list[Tensor]:
        engine = load()
        return [engine.memory.key, engine.memory.value, engine.model.head]

    def copy_and_project() -> list[Tensor]:
        copied = {name: tensor.clone() for name, tensor in load_file(file, device=str(lab.device)).items()}
        return [*projected(lab.reference.model, copied["memory"]), copied["lm_head.weight"]]

    memory = lab.engine.memory
    return Case(
        builders={
            "memkernel": lambda: Contender(load, loaded),
            "safetensors": lambda: Contender(copy_and_project),
        },
        truth=[memory.key, memory.value, lab.engine.model.head],
        bound=OP_BOUND[lab.dtype],
        work=Work(size, size, 2 * lab.config.num_layers * lab.config.memory_rows * lab.least.keys_values),
        holds=folder,
    )


@pytest.mark.parametrize("contender", ["memkernel", "safetensors"])
def bench_load(race, contender):
    race("load", {}, contender, load_case)
