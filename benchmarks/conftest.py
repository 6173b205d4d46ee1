"""`pytest benchmarks/` runs every body once at tiny shapes and compares the outputs; `--benchmark` times them.

A test is one contender of one case. The first contender of a case that runs measures all of them, in turns; each test
then hands its rounds to pytest-benchmark (whose --benchmark-json, --benchmark-compare, --benchmark-histogram and
--benchmark-autosave work as usual) and appends its row to the results file.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import race as racing
from benchmarks.lab import Lab
from benchmarks.report import table
from benchmarks.shapes import SHAPES
from memkernel.engine import choose


class ReplayClock:
    """A timer that advances by what was measured: pytest-benchmark's statistics over rounds taken in turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


REPLAY = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("memkernel")
    group.addoption("--benchmark", action="store_true", help="time the contenders; without it, each runs once")
    group.addoption("--shape", choices=sorted(SHAPES), help="default: tiny; with --benchmark 1b on a CPU, 8b on CUDA")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.addoption(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results.jsonl",
        help="file that --benchmark appends a JSON line per row to; default benchmarks/results.jsonl",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "benchmark: options of pytest-benchmark")
    timed = config.getoption("benchmark")
    if not timed:
        config.option.benchmark_disable = True
    elif not config.getoption("benchmark_compare"):
        config.option.benchmark_quiet = True  # the summary below has the same numbers and more
    config.memkernel_rows = []


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture(scope="session")
def lab(pytestconfig) -> Lab:
    timed = pytestconfig.getoption("benchmark")
    device, dtype, _ = choose(pytestconfig.getoption("device") or "auto", "auto")
    shape = pytestconfig.getoption("shape")
    if shape is None:
        shape = {"cpu": "1b", "cuda": "8b"}[device.type] if timed else "tiny"
    return Lab(shape, device, dtype, timed)


@pytest.fixture(scope="session")
def session(lab, pytestconfig) -> racing.Session:
    return racing.Session(lab, pytestconfig.getoption("results") if lab.timed else None, pytestconfig.memkernel_rows)


@pytest.fixture
def race(request, session, benchmark):
    """race(workload, parameters, contender, build): run the case if it has not run yet, report this contender."""

    def run(workload: str, parameters: dict, contender: str, build) -> None:
        with torch.inference_mode():
            entry = session.entry(workload, parameters, contender, build)
        if "unavailable" in entry.row:
            pytest.skip(f"{contender}: {entry.row['unavailable']}")
        if "refused" in entry.row:
            pytest.fail(f"{contender}: {entry.row['refused']}")
        benchmark.group = entry.group
        benchmark.extra_info.update(entry.row)
        rounds = iter(entry.rounds)

        def replay():
            REPLAY.now += next(rounds, 0.0)

        benchmark.pedantic(replay, rounds=max(1, len(entry.rounds)))

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.memkernel_rows
    if rows and config.getoption("benchmark"):
        terminalreporter.section("memkernel benchmarks")
        terminalreporter.write_line(table(rows))
