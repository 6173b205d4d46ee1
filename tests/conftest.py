"""Shared fixtures. Nothing here needs a GPU or a network."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which memkernel does

from memkernel import huge_pages, tiny

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits, and starves whatever else runs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_empty(monkeypatch):
    """Uninitialised memory holds NaN, so that a row which is never written cannot pass for a right one."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (huge_pages, "empty")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **kwargs):
            out = real(*args, **kwargs)
            real_floats = out.is_floating_point() and not out.is_meta and not out.requires_grad
            return out.fill_(torch.nan) if real_floats else out

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def folder(tmp_path):
    """A tiny MemoryLLM with random weights, an empty memory and a byte tokenizer."""
    path = tiny.write_checkpoint(tmp_path / "checkpoint")
    tiny.write_tokenizer(path)
    return path
