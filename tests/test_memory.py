"""The memory as an object: in-place updates, the draw's statistics, files, forks, a thousand updates."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memkernel
from memkernel import ops, reference, tiny
from memkernel.memory import Delta


@pytest.fixture
def engine(folder):
    return memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, keep_hidden=True, seed=7)


def state_of(memory):
    tensors = {name: tensor.clone() for name, tensor in memory._state().items()}
    return tensors, (memory.step, memory.seed, memory.initialized)


def assert_same_state(got, want):
    assert got[1] == want[1]
    for name in want[0]:
        assert torch.equal(got[0][name], want[0][name]), name


def random_ids(count):
    return torch.randint(256, (count,))


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class LargestAllocation(TorchDispatchMode):
    """The size of the largest storage that an operation inside the block allocates."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def chi_square_p(observed, expected, freedom):
    """Upper tail of chi-square for many degrees of freedom (Wilson and Hilferty's cube-root normal)."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


# -- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, count, steps", [(12, 3, 500), (128, 16, 250), (1000, 20, 200)])
def test_draw_is_uniform_over_ranks_and_pairs(rows, count, steps):
    """Exactly uniform draws fail one of these at p < 1e-4 once in thousands of seeds; the seed is fixed."""
    drawn = torch.cat(
        [ops.draw_ranks(torch.tensor([11, step]), 64, rows, count, False) for step in range(steps)]
    ).long()
    draws = len(drawn)
    hits = torch.bincount(drawn.reshape(-1), minlength=rows).double()
    # Without replacement the counts vary less than multinomial ones: by the factor (rows - count) / (rows - 1).
    scale = (rows - count) / (rows - 1)
    mean = draws * count / rows
    p_marginal = chi_square_p(mean + (hits - mean) / math.sqrt(scale), torch.tensor(mean), rows - 1)
    gap = (drawn[:, 1:] - drawn[:, :-1]) % rows  # consecutive picks: every non-zero distance is equally likely
    lags = torch.bincount(gap.reshape(-1), minlength=rows)[1:].double()
    p_pairs = chi_square_p(lags, lags.sum() / (rows - 1), rows - 2)
    print(f"{rows} rows, {draws} draws of {count}: marginal p = {p_marginal:.3f}, pair p = {p_pairs:.3f}")
    assert 1e-4 < p_marginal < 1 - 1e-4 and 1e-4 < p_pairs < 1 - 1e-4


def test_draws_of_different_seeds_steps_and_layers_overlap_as_chance_has_it():
    rows, count = 1000, 200
    sets = [
        ops.draw_ranks(torch.tensor(state), 2, rows, count, False) for state in ([0, 0], [0, 1], [1, 0], [2**62, 0])
    ]
    flat = [set(layer.tolist()) for drawn in sets for layer in drawn]
    expected, deviation = (
        count * count / rows,
        math.sqrt(count * (count / rows) * (1 - count / rows) ** 2 * rows / (rows - 1)),
    )
    for i, a in enumerate(flat):
        for b in flat[:i]:
            assert abs(len(a & b) - expected) < 5 * deviation


def test_published_draw_is_randperm_on_the_default_generator(folder):
    for shared in (False, True):
        config = tiny.MEMORYLLM | {"drop_memory_per_layer": not shared}
        tiny.write_checkpoint(folder, config)
        engine = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, draw="published")
        engine.update(random_ids(40))
        ids = random_ids(40)
        torch.manual_seed(99)
        want = torch.stack([torch.randperm(128)[112:] for _ in range(1 if shared else 3)]).expand(3, 16)
        rank = engine.memory.rank.clone()
        torch.manual_seed(99)
        engine.update(ids)
        overwritten = engine.memory.rank >= 112
        for i in range(3):
            assert sorted(rank[i, overwritten[i]].tolist()) == sorted(want[i].tolist())


# -- in place ---------------------------------------------------------------------------------------------------------


def test_update_is_in_place_and_its_cost_is_the_rows_written(tmp_path):
    """The pool's storages never move; between 1,600 and 51,200 rows only integer work grows."""
    allocated = {}
    for blocks in (100, 3200):
        config = tiny.MEMORYLLM | {"num_blocks": blocks}
        folder = tiny.write_checkpoint(tmp_path / str(blocks), config)
        memory = memkernel.Engine.from_pretrained(
            folder, device="cpu", dtype=torch.float32, keep_hidden=True, ops=reference
        ).memory
        L, M, G, D = memory.key.shape
        W, E = memory.recent.shape[1:]
        addresses = {name: tensor.data_ptr() for name, tensor in memory._state().items()}
        delta = Delta(torch.randn(L, W, G, D), torch.randn(L, W, G, D), torch.randn(L, W, E))
        memory.write(delta)
        with LargestAllocation() as watch:
            memory.write(delta)
        assert {name: tensor.data_ptr() for name, tensor in memory._state().items()} == addresses
        # The largest temporary is integers, 8 bytes a row, or the rows written; never a pool.
        assert 0 < watch.bytes <= max(8 * L * M, 4 * L * W * E)
        allocated[blocks] = watch.bytes
    pool_bytes = 4 * 3 * 3200 * 16 * 64
    assert allocated[3200] < pool_bytes / 4


def test_first_update_needs_no_second_pool(engine):
    addresses = {name: tensor.data_ptr() for name, tensor in engine.memory._state().items()}
    engine.update(random_ids(40))
    assert {name: tensor.data_ptr() for name, tensor in engine.memory._state().items()} == addresses
    assert engine.memory.initialized and engine.memory.step == 1


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 128, 200])
def test_write_takes_deltas_of_any_size(engine, rows):
    """R rows fill an empty pool by repetition, and later drop R; with hidden states kept, R may be under W."""
    memory = engine.memory
    L, M, G, D = memory.key.shape
    W, E = memory.recent.shape[1:]

    def delta():
        return Delta(torch.randn(L, rows, G, D), torch.randn(L, rows, G, D), torch.randn(L, rows, E))

    first = delta()
    memory.write(first)
    repeated = [first.hidden] * (M // rows) + ([first.hidden[:, -(M % rows) :]] if M % rows else [])
    want = torch.cat(repeated, dim=1) if rows < M else first.hidden[:, -M:]
    assert torch.equal(memory.hidden(), want)
    assert torch.equal(memory.recent, want[:, -W:])
    if rows > M:
        with pytest.raises(ValueError, match="delta: expected 1 to 128 rows"):
            memory.write(first)
        return
    dropped = torch.stack([torch.randperm(M)[:rows] for _ in range(L)])
    second = delta()
    memory.write(second, dropped)
    for i in range(L):
        kept = [r for r in range(M) if r not in dropped[i].tolist()]
        assert torch.equal(memory.hidden()[i], torch.cat([want[i, kept], second.hidden[i]]))
    assert torch.equal(memory.recent, memory.hidden()[:, -W:])


# -- whole memories ---------------------------------------------------------------------------------------------------


def test_save_and_load_in_another_process(engine, folder, tmp_path):
    path = tmp_path / "a.memory"
    for length in (40, 200, 17):
        engine.update(random_ids(length))
    engine.memory.save(path)
    prompt = random_ids(9)
    want = engine.generate(prompt, max_new_tokens=8).token_ids
    code = (
        "import sys, torch, memkernel\n"
        f"engine = memkernel.Engine.from_pretrained({str(folder)!r}, device='cpu', dtype='float32', keep_hidden=True)\n"
        f"engine.memory.load({str(path)!r})\n"
        f"print(engine.generate({prompt.tolist()}, max_new_tokens=8).token_ids, engine.memory.step, engine.memory.seed)"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert got.strip() == f"{want} 3 7"


def test_a_loaded_memory_continues_as_the_saved_one_would(engine, tmp_path):
    engine.update(random_ids(600))
    engine.memory.save(tmp_path / "a.memory")
    ids = random_ids(40)
    engine.update(ids)
    want = state_of(engine.memory)
    engine.memory.reset()
    engine.memory.load(tmp_path / "a.memory")
    engine.update(ids)
    assert_same_state(state_of(engine.memory), want)


def test_memory_without_hidden_states_reads_a_file_with_them(engine, folder, tmp_path):
    engine.update(random_ids(40))
    engine.memory.save(tmp_path / "a.memory")
    bare = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    bare.memory.load(tmp_path / "a.memory")
    prompt = random_ids(5)
    assert torch.equal(bare.logits(prompt), engine.logits(prompt))
    bare.memory.save(tmp_path / "b.memory")
    with pytest.raises(ValueError, match="keep_hidden"):
        engine.memory.load(tmp_path / "b.memory")


def test_every_flipped_byte_of_a_file_is_refused(engine, tmp_path):
    path = tmp_path / "a.memory"
    engine.update(random_ids(40))
    engine.memory.save(path)
    want, good = state_of(engine.memory), path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, header, 7), *torch.randint(header, len(good), (40,)).tolist(), len(good) - 1]
    for place in places:
        for flip in (0x01, 0xFF):
            bad = bytearray(good)
            bad[place] ^= flip
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"a\.memory"):
                engine.memory.load(path)
    for length in (0, 7, header - 1, header, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"a\.memory"):
            engine.memory.load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match=r"a\.memory"):
        engine.memory.load(path)
    assert_same_state(state_of(engine.memory), want)


def test_kill_9_during_a_save_leaves_the_old_file_or_the_new_one(folder, tmp_path):
    """A child saves two memories in turn over one file, and is killed at random moments."""
    path = tmp_path / "a.memory"
    code = (
        "import torch, memkernel\n"
        f"engine = memkernel.Engine.from_pretrained({str(folder)!r}, device='cpu', dtype='float32', keep_hidden=True)\n"
        "engine.update(list(range(40)))\n"
        "other = engine.memory.fork()\n"
        "other.write(engine.model.inject(torch.arange(40), other))\n"
        "while True:\n"
        f"    engine.memory.save({str(path)!r})\n"
        "    print('saved', flush=True)\n"
        f"    other.save({str(path)!r})\n"
    )
    engine = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, keep_hidden=True)
    steps = []
    for delay in torch.rand(5).tolist():
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"saved\n"
        time.sleep(delay / 10)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        engine.memory.load(path)  # whole, or this raises
        steps.append(engine.memory.step)
    assert set(steps) <= {1, 2}


def test_a_save_that_fails_leaves_the_old_file_and_no_other(engine, tmp_path, monkeypatch):
    path = tmp_path / "a.memory"
    engine.update(random_ids(40))
    engine.memory.save(path)
    before = path.read_bytes()
    engine.update(random_ids(40))

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memkernel.memory.memory_file.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        engine.memory.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.memory"]


def test_fork_is_independent(engine):
    engine.update(random_ids(60))
    prompt = random_ids(6)
    before, other = state_of(engine.memory), engine.memory.fork()
    logits = engine.logits(prompt)
    other.write(engine.model.inject(random_ids(40), other))
    assert_same_state(state_of(engine.memory), before)
    assert torch.equal(engine.logits(prompt), logits)
    engine.memory = other
    assert not torch.equal(engine.logits(prompt), logits)


def test_reset_forgets(engine):
    prompt = random_ids(6)
    empty = engine.logits(prompt)
    engine.update(random_ids(60))
    assert not torch.equal(engine.logits(prompt), empty)
    engine.memory.reset()
    assert torch.equal(engine.logits(prompt), empty)
    assert (engine.memory.step, engine.memory.initialized) == (0, False)
    assert not engine.memory.hidden().any() and not engine.memory.key.any()


def test_an_engine_made_in_inference_mode_can_be_updated_outside(folder, tmp_path):
    with torch.inference_mode():
        engine = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
        engine.update(random_ids(40))
        engine.memory.save(tmp_path / "a.memory")
        other = engine.memory.fork()
    engine.update(random_ids(40))
    engine.memory.load(tmp_path / "a.memory")
    for memory in (other, engine.memory):
        memory.write(engine.model.inject(random_ids(40), memory))
        assert memory.step == 2
    engine.logits(random_ids(4))[0, 0] = 0  # the caller's to change


# -- without end ------------------------------------------------------------------------------------------------------


def test_a_thousand_updates(folder):
    """Ranks stay a permutation, survivors follow (1 - W/M)^t, process memory is flat, a replay gives the same pool."""
    texts = torch.randint(256, (1000, 24))

    def run(watch):
        engine = memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, keep_hidden=True, seed=3)
        memory = engine.memory
        L, M = memory.rank.shape
        W = memory.recent.shape[1]
        birth, ages, alive, resident = torch.zeros(L, M), torch.zeros(60), torch.zeros(60), []
        for t, ids in enumerate(texts):
            engine.update(ids)
            if not watch:
                continue
            assert torch.equal(memory.rank.sort(1).values, torch.arange(M, dtype=torch.int32).expand(L, M))
            birth[memory.rank >= M - W] = t
            if t >= 100:  # the first fill has left
                counts = torch.bincount((t - birth).long().clamp(max=60).reshape(-1), minlength=61)[:60]
                alive += counts
                ages += L * W
            if t % 100 == 99:
                resident.append(resident_bytes())
        if watch:
            share, theory = alive / ages, (1 - W / M) ** torch.arange(60.0)
            # 900 * L * W rows of each age; rows of one update leave almost independently.
            deviation = (theory * (1 - theory) / ages).sqrt()
            worst = ((share - theory).abs() / deviation.clamp(min=1e-9))[1:].max()
            print(f"survivors against (1 - W/M)^t: at most {worst:.1f} standard deviations, t = 1..59")
            assert share[0] == 1 and worst < 4.5
            assert resident[-1] - resident[1] < 8 << 20, f"resident bytes at each 100 updates: {resident}"
        return memory

    first, second = run(watch=True), run(watch=False)
    assert_same_state(state_of(first), state_of(second))
    assert first.step == 1000
    assert all(tensor.isfinite().all() for tensor in state_of(first)[0].values())
