"""The benchmarks as an instrument: the work they count, the outputs they refuse, the files they write."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_memory_attention, bench_update, report
from benchmarks.lab import Lab
from benchmarks.race import Session
from benchmarks.shapes import Least, Work, filled_memory, random_model
from benchmarks.timing import CYCLES, HEAD_START, Ceilings, Clock, Contender, Gauge, relative_error
from memkernel import huge_pages, ops, reference, tiny
from memkernel.config import ModelConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path):
    lab = Lab("tiny", CPU, torch.float32, timed=True)
    return Session(lab, tmp_path / "results.jsonl", [])


def counted_flop(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("T", [1, 9, 40])
def test_least_work_is_what_the_reference_multiplies_less_what_its_mask_hides(T):
    raw = {k: v for k, v in tiny.MEMORYLLM.items() if not k.endswith("_token_id")}
    model, tensors = random_model(raw, torch.float32, CPU)
    model.ops = reference
    memory = filled_memory(model, tensors["memory"])
    config, least = ModelConfig.from_dict(raw), Least(ModelConfig.from_dict(raw), torch.float32)
    ids, W = torch.arange(T), config.write_rows
    per_pair = 4 * config.num_heads * config.head_size
    cache = model.new_cache(1, T, memory)
    read = counted_flop(lambda: model.logits(model.read(ids[None], cache, memory)[:, -1]))
    assert read == least.read(T).flop + config.num_layers * per_pair * T * (T - 1) / 2
    queries = [max(T, W)] * (config.num_layers - 1) + [W]
    hidden_pairs = sum(q * (q - 1) / 2 for q in queries)
    assert counted_flop(lambda: model.inject(ids, memory)) == least.inject(T).flop + per_pair * hidden_pairs


def test_the_ceiling_is_the_slower_of_memory_and_matrix_rate():
    ceilings = Ceilings(read=10.0, copy=20.0, matmul=100.0)
    assert ceilings.seconds(Work(read=100)) == (10.0, "memory")
    assert ceilings.seconds(Work(read=100, written=100)) == (10.0, "memory")
    assert ceilings.seconds(Work(read=100, written=40)) == (60 / 10 + 80 / 20, "memory")
    assert ceilings.seconds(Work(read=100, flop=5000)) == (50.0, "matrix")


def interleaved(contenders):
    clock = Clock(CPU)
    gauge = Gauge(clock, CPU, torch.float32, tiny=True)
    return clock.interleaved(contenders, dict.fromkeys(contenders, 0.0), False, budget=0.0, min_rounds=4, gauge=gauge)


def test_the_host_launches_a_cold_call_on_a_gpu_before_the_device_begins(monkeypatch):
    """Whose part is played here: a launch takes the host 2 ms, and the device nothing."""
    slept, log = [], []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (log.append("sleep"), slept.append(cycles / CYCLES)))
    clock = Clock(CPU)
    clock.on_gpu = True
    clock.began, clock.ended = Event(True), Event(True)

    def call():
        log.append("call")
        time.sleep(2e-3)

    for _ in range(2):
        assert clock.seconds(call, cold=True) == (7e-3, 7e-3)
    assert log == ["wait", "sleep", "event", "call", "event", "wait"] * 2
    assert slept[0] == 1.5 * HEAD_START and 3e-3 <= slept[1] <= 4 * HEAD_START
    wall, device = clock.seconds(call)
    assert 2e-3 <= wall < 7e-3 == device and len(slept) == 2


def test_rounds_take_turns_and_quick_contenders_are_called_more_often():
    order = []

    def spin(name, n):
        order.append(name)
        return sum(range(n))

    contenders = {
        "slow": Contender(lambda: spin("slow", 2_000_000), list),
        "quick": Contender(lambda: spin("quick", 200_000), list),
    }
    rounds = interleaved(contenders)
    samples = rounds.samples
    assert [len(taken.wall) for taken in samples.values()] == [4, 4] and len(rounds.ceilings) == 4
    turns = re.sub(r"(\w)\1*", r"\1", "".join(name[0] for name in order[2:]))
    assert turns == "qsqsqs"[: len(turns)] or turns == "sqsqs"
    assert order.count("quick") > 2 * order.count("slow")
    assert samples["slow"].wall[0] > samples["quick"].wall[0]


def test_the_machine_is_gauged_right_beside_the_first_contender_of_each_round():
    order, rate = [], Ceilings(1.0, 1.0, 1.0)

    def turn(name):
        return Contender(lambda: order.append(name))

    Clock(CPU).interleaved(
        {"first": turn("first"), "second": turn("second")},
        {"first": 1.0, "second": 1.0},  # as slow as that they are called once a round
        cold=False,
        budget=0.0,
        min_rounds=3,
        gauge=lambda: order.append("gauge") or rate,
    )
    assert order == ["gauge", "first", "second", "second", "first", "gauge", "gauge", "first", "second"]


def test_a_contender_that_breaks_while_it_is_timed_is_out_and_the_others_go_on():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    rounds = interleaved({"breaks": Contender(breaks), "works": Contender(list)})
    assert rounds.failed == {"breaks": "RuntimeError: out of memory"}
    assert list(rounds.samples) == ["works"] and len(rounds.samples["works"].wall) == 4


def test_an_output_that_is_not_finite_or_of_another_shape_never_agrees():
    assert relative_error([torch.tensor([1.0, torch.nan])], [torch.ones(2)]) == float("inf")
    assert relative_error([torch.tensor([1.0, torch.inf])], [torch.ones(2)]) == float("inf")
    with pytest.raises(ValueError, match="output: expected shape"):
        relative_error([torch.ones(3)], [torch.ones(2)])


def without_last_memory_row(query, memory_key, memory_value, *own):
    return reference.memory_attention(query, memory_key[:, :-1], memory_value[:, :-1], *own)


def seeing_one_row_ahead(query, memory_key, memory_value, key, value, start):
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 1)) for rows in (key, value)]
    return reference.memory_attention(query, memory_key, memory_value, *padded, start + 1)


def with_heads_of_another_group(query, *rest):
    return reference.memory_attention(query.roll(1, dims=2), *rest)


@pytest.mark.parametrize("broken", [without_last_memory_row, seeing_one_row_ahead, with_heads_of_another_group])
def test_a_broken_attention_kernel_is_refused(session, monkeypatch, broken):
    monkeypatch.setattr(ops, "memory_attention", broken)
    build = lambda lab: bench_memory_attention.attention_case(lab, 16, past=1, B=1)  # noqa: E731
    row = session.entry("attention", {"T": 16}, "memkernel", build).row
    assert "differs" in row["refused"] and not {"median_s", "share", "ratio"} & set(row)
    rival = session.entry("attention", {"T": 16}, "sdpa", build).row
    assert rival["median_s"] > 0 and "ratio" not in rival
    assert "refused" in json.loads(session.results.read_text().splitlines()[0])


def test_an_output_of_another_shape_is_refused_and_the_others_go_on(session, monkeypatch):
    monkeypatch.setattr(ops, "memory_attention", lambda *given: reference.memory_attention(*given)[..., 1:])
    build = lambda lab: bench_memory_attention.attention_case(lab, 16, past=1, B=1)  # noqa: E731
    assert "expected shape" in session.entry("attention", {"T": 16}, "memkernel", build).row["refused"]
    assert session.entry("attention", {"T": 16}, "sdpa", build).row["median_s"] > 0


def test_a_broken_write_kernel_is_refused(session, monkeypatch):
    def forgets_to_close_the_ranks(pools, rank, rows, dropped):
        kept = rank.clone()
        reference.memory_write_(pools, rank, rows, dropped)
        rank.copy_(kept)

    monkeypatch.setattr(ops, "memory_write_", forgets_to_close_the_ranks)
    for workload, build in (
        ("write", lambda lab: bench_update.write_case(lab, 128)),
        ("update", lambda lab: bench_update.update_case(lab, 16)),
    ):
        assert "differs" in session.entry(workload, {}, "memkernel", build).row["refused"]
        assert "ratio" not in session.entry(workload, {}, "published", build).row


def test_a_rival_that_breaks_is_named_and_the_others_go_on(session):
    def build(lab):
        case = bench_update.write_case(lab, 128)

        def broken():
            raise RuntimeError("out of memory")

        return bench_update.Case(case.builders | {"published": broken}, case.truth, 0.0, case.work)

    assert session.entry("write", {}, "published", build).row["unavailable"] == "RuntimeError: out of memory"
    assert session.entry("write", {}, "memkernel", build).row["ratio"] == 1.0


@pytest.mark.parametrize("broken, compared", [(["published"], True), (["published", "reference"], False)])
def test_without_the_published_flow_the_reference_is_the_truth_and_without_both_ours_is_refused(
    session, broken, compared
):
    def build(lab):
        case = bench_update.update_case(lab, 16)

        def breaks():
            raise RuntimeError("out of memory")

        return replace(case, builders=case.builders | dict.fromkeys(broken, breaks))

    row = session.entry("update", {"T": 16}, "memkernel", build).row
    assert ("median_s" in row) == compared
    assert compared or row["refused"] == "nothing to compare its output with: published and reference did not run"


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("flag_first", [True, False])
def test_the_command_times_and_hands_its_rounds_to_pytest_benchmark(tmp_path, flag_first):
    path, flags = "benchmarks/bench_small_ops.py", ["--benchmark", "--shape", "tiny", "--device", "cpu"]
    files = ["--results", tmp_path / "rows", f"--benchmark-json={tmp_path / 'json'}", "-k", "swiglu and T512"]
    words = [*flags, path] if flag_first else [path, *flags]
    done = run(sys.executable, "-m", "pytest", *words, *files)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["contender"] for row in rows] == ["memkernel", "reference", "pytorch"]
    assert "swiglu T 512" in done.stdout and "GFLOP" in done.stdout
    stats = {
        one["extra_info"]["contender"]: one["stats"]
        for one in json.loads((tmp_path / "json").read_text())["benchmarks"]
    }
    for row in rows:
        assert stats[row["contender"]]["rounds"] == row["rounds"]
        assert stats[row["contender"]]["median"] == pytest.approx(row["median_s"])


def test_the_gpu_script_goes_through_its_parts_and_the_report_shows_every_row(tmp_path):
    done = run("bash", "benchmarks/on_gpu.sh", tmp_path / "out", "--dry-run", PYTHON=sys.executable)
    logs = "".join(log.read_text()[-3000:] for log in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    verdicts = dict(re.findall(r"^(\w+) +(passed|not run)", (tmp_path / "out" / "summary.txt").read_text(), re.M))
    assert verdicts == dict.fromkeys(["tests", "build", "benchmarks", "report"], "passed") | {"sanitizer": "not run"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    unavailable = {row["contender"] for row in rows if "unavailable" in row}
    same_pages = set() if huge_pages.setting() in ("always", "madvise") else {"ordinary pages"}
    assert unavailable == {"sdpa-cudnn", "flex", "cuda c++", "one by one"} | same_pages
    assert not [row for row in rows if "refused" in row]
    text = (tmp_path / "out" / "report.txt").read_text()
    report.write_report(rows, tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    for case, some in report.by_case(rows).items():
        assert case in text and case in markdown
        assert all(report.cells(row)[0] in markdown for row in some)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5


def test_two_runs_are_compared_by_the_ratios_of_their_rivals():
    common = {"workload": "decode", "machine": "here", "shape": "1b", "run": "3"}
    rows = [common | {"B": B, "contender": name, "ratio": 2.0} for B in (1, 8) for name in ("memkernel", "sdpa")]
    others = [row | {"run": "4", "ratio": 2.0 * row["B"] ** 0.04} for row in rows] + [common | {"contender": "flex"}]
    oldest = [row | {"run": "1", "ratio": 9.0} for row in rows]
    assert report.agreement(oldest + rows + others).splitlines()[-1] == "2 of 2 ratios within 10%"
    others[1]["ratio"] = 1.8
    assert report.agreement(rows + others).splitlines()[-1] == "1 of 2 ratios within 10%"
    assert report.agreement(rows + [row | {"shape": "8b"} for row in others]) == "0 of 0 ratios within 10%"


def test_the_readme_shows_the_newest_code_on_each_kind_of_device(tmp_path):
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    timed = {"workload": "decode", "B": 1, "contender": "memkernel", "shape": "1b", "dtype": "bfloat16", "dirty": False}
    timed |= {"versions": {}, "ceilings": {}, "median_s": 1.0, "share": 0.5, "bound_by": "memory", "rounds": 3}
    where = [
        ("old", "cpu", "2", "aaa"),
        ("new", "cpu", "3", "bbb"),
        ("gpu", "cuda", "1", "aaa"),
        ("too", "cpu", "1", "bbb"),
    ]
    rows = [timed | dict(zip(("machine", "device", "run", "commit"), one, strict=True)) for one in where]
    report.write_readme(rows, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert re.findall(r"^(\w+); shape", text, re.M) == ["new", "gpu", "too"]


def test_the_readme_block_is_replaced_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme([], readme)
    assert readme.read_text() == f"before\n{report.BEGIN}\n\n{report.END}\nafter\n"
    readme.write_text("no block")
    with pytest.raises(ValueError, match="expected one block"):
        report.write_readme([], readme)
