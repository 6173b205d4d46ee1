"""A memory as a whole: saved to a file, loaded, forked. The published code has no such functions; its rival is what its
users write: the pool of hidden states through safetensors or a clone, with no digest, check or fsync."""

import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.shapes import Work, projected
from benchmarks.timing import Contender


def memory_file_case(lab: Lab, job: str) -> Case:
    memory, model, pool = lab.engine.memory, lab.engine.model, lab.published().memory
    spare = memory.fork()
    folder = tempfile.TemporaryDirectory()
    ours, theirs = Path(folder.name) / "memory", Path(folder.name) / "pool"

    def save_pool() -> None:
        save_file({"memory": pool}, theirs)

    def load_pool() -> Tensor:
        return load_file(theirs, device=str(lab.device))["memory"].clone()  # else the file would be mapped, not read

    def saved() -> list[Tensor]:
        memory.save(ours)
        return loaded()

    def loaded() -> list[Tensor]:
        spare.reset()
        spare.load(ours)
        return [spare.key, spare.value]

    def pool_saved() -> list[Tensor]:
        save_pool()
        return projected(model, load_pool())

    memory.save(ours)
    save_pool()
    jobs = {
        "save": (Contender(lambda: memory.save(ours), saved), Contender(save_pool, pool_saved)),
        "load": (
            Contender(lambda: spare.load(ours), loaded),
            Contender(load_pool, lambda: projected(model, load_pool())),
        ),
        "fork": (
            Contender(memory.fork, lambda: [(fork := memory.fork()).key, fork.value]),
            Contender(pool.clone, lambda: projected(model, pool.clone())),
        ),
    }
    file_bytes = ours.stat().st_size
    copied = file_bytes if job != "fork" else sum(t.nbytes for t in vars(memory).values() if isinstance(t, Tensor))
    return Case(
        builders=dict(zip(("memkernel", "published"), (lambda c=c: c for c in jobs[job]), strict=True)),
        truth=[memory.key, memory.value],
        bound=0.0,
        work=Work(copied, copied),
        holds=folder,
    )


@pytest.mark.parametrize("contender", ["memkernel", "published"])
@pytest.mark.parametrize("job", ["save", "load", "fork"])
def bench_memory(race, contender, job):
    race(f"memory {job}", {}, contender, lambda lab: memory_file_case(lab, job))
