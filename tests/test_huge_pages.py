"""Large tensors on CPUs: where they begin, what the system gave them, and that memories and models use them."""

import mmap
import re
from pathlib import Path

import pytest
import torch

import memkernel
from memkernel import huge_pages, tiny

CPU = torch.device("cpu")
PAGE = huge_pages.PAGE
SMAPS = Path("/proc/self/smaps")
on_linux = pytest.mark.skipif(huge_pages.ADVICE is None, reason="only Linux can be asked for huge pages")


def flags(tensor):
    """What the system notes about the mapping of the tensor's first byte: `hg` if huge pages were asked for."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= tensor.data_ptr() < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping of this address")


@on_linux
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("extra", [0, 1, 4097])
def test_a_large_tensor_begins_with_a_page(dtype, extra):
    count = PAGE // dtype.itemsize + extra
    x = huge_pages.empty((count,), dtype, CPU)
    assert (x.shape, x.dtype, x.device) == ((count,), dtype, CPU)
    assert x.is_contiguous() and x.data_ptr() % PAGE == 0
    x.fill_(3)
    assert (x == 3).all()
    assert x.untyped_storage().nbytes() <= x.nbytes + PAGE


@pytest.mark.parametrize("shape", [(), (0, 7), (3, 5), (PAGE // 4 - 1,)])
def test_a_small_tensor_is_an_ordinary_one(shape):
    x = huge_pages.empty(shape, torch.float32, CPU)
    assert x.shape == shape and x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.nbytes


def test_where_nobody_can_be_asked_tensors_are_ordinary(monkeypatch):
    monkeypatch.setattr(huge_pages, "ADVICE", None)
    x = huge_pages.empty((PAGE,), torch.float32, CPU)
    assert x.shape == (PAGE,) and x.storage_offset() == 0


@pytest.mark.parametrize("text, said", [("always [madvise] never", "madvise"), ("always madvise [never]\n", "never")])
def test_the_setting_is_the_one_in_brackets(monkeypatch, tmp_path, text, said):
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    assert huge_pages.setting() == said
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "none")
    assert huge_pages.setting() == "unknown"


@pytest.mark.skipif(
    huge_pages.setting() == "unknown" or not SMAPS.is_file() or "VmFlags" not in SMAPS.read_text(),
    reason="this system does not say what it was asked for",
)
def test_the_system_is_asked_for_huge_pages():
    assert "hg" in flags(huge_pages.empty((16 * PAGE,), torch.uint8, CPU))
    assert "hg" not in flags(torch.zeros(16 * PAGE, dtype=torch.uint8))


@on_linux
def test_pages_that_the_allocator_gives_again_are_given_back(monkeypatch):
    used = torch.full((4 * PAGE,), 7, dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: used)
    x = huge_pages.empty((3 * PAGE - 5,), torch.uint8, CPU)
    assert not x[: -mmap.PAGESIZE].any()  # what was there is gone; a last page that is shared stays
    begin = x.data_ptr() - used.data_ptr()
    assert (used[:begin] == 7).all() and (used[begin + len(x) :] == 7).all()


def test_a_default_device_is_not_used():
    with torch.device("meta"):
        assert all(huge_pages.empty((n,), torch.uint8, CPU).device == CPU for n in (8, PAGE))


@on_linux
def test_pools_weights_and_forks_begin_with_pages(tmp_path):
    shape = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_blocks": 100}
    folder = tiny.write_checkpoint(tmp_path / "large", tiny.MEMORYLLM | shape)
    engine = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, keep_hidden=True)
    fork = engine.memory.fork()
    for memory in (engine.memory, fork):
        for tensor in (memory.key, memory.value, memory.rotated_key, memory.hidden_by_slot):
            assert tensor.nbytes >= PAGE and tensor.data_ptr() % PAGE == 0
    for weight in (engine.model.embedding, engine.model.layers[0].gate_up.weight):
        assert weight.nbytes >= PAGE and weight.data_ptr() % PAGE == 0
    for name, tensor in vars(engine.memory).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, getattr(fork, name)) and tensor.data_ptr() != getattr(fork, name).data_ptr()
