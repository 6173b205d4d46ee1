"""Ceilings of the machine, interleaved timing, and what one call allocates. Nothing here knows a workload."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import Work
from memkernel import huge_pages

HEAD_START = 5e-3  # seconds that the host is taken to need for launching a call's kernels, until it has been seen
CYCLES = 2e9  # a second of it, at the highest clock rate
EVICTING_BYTES = 256 << 20  # several times the largest cache of the machines that we know
ROUND = 0.1  # seconds up to which quick contenders repeat their call in a round that has slower ones
PATIENCE = 6.0  # seconds of timing after which long calls need no further round: they average over noise themselves


def nothing() -> None:
    pass


@dataclass
class Contender:
    """One way to do the work. Only `call` is timed. What is compared with the truth is its result or, if given, that of
    `output`, which goes through the same code. `before` readies either."""

    call: Callable[[], object]
    output: Callable[[], list[Tensor]] | None = None
    before: Callable[[], None] = nothing
    configuration: str | None = None  # where there were several to choose from


@dataclass
class Samples:
    """Seconds of each round, the median of the round's calls: by the host's clock (cold calls on a GPU aside) and, on a
    GPU, between two events around the call on the device."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


@dataclass
class Rounds:
    """What was timed: samples of each contender, the machine's rates at each round, and why a contender broke off."""

    samples: dict[str, Samples]
    ceilings: list["Ceilings"] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine: bytes/s reading, bytes/s copying (read + written), FLOP/s multiplying."""

    read: float
    copy: float
    matmul: float

    def seconds(self, work: Work) -> tuple[float, str]:
        """The least time for `work`, and which rate sets it."""
        copied = 2 * min(work.read, work.written)
        moving = (work.read + work.written - copied) / self.read + copied / self.copy
        multiplying = work.flop / self.matmul
        return max((moving, "memory"), (multiplying, "matrix"))


class Clock:
    """Times calls on one device; where asked, with caches that hold nothing of the call's data."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.evicting = torch.ones(EVICTING_BYTES // 4, device=device)
        self.launching = WeakKeyDictionary()  # seconds that the host took for a cold call the last time
        if self.on_gpu:
            self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Callable, before: Callable = nothing, cold: bool = False) -> tuple[float, float]:
        """(wall, device) seconds of one call. Device seconds are the wall's where the device is the CPU.

        Cold calls are of single ops, which a model launches from a graph. So on a GPU the host gets a head start, in
        which it launches all of the call's kernels, and the wall's seconds are the device's.
        """
        before()
        if not self.on_gpu:
            if cold:
                self.evicting.sum()  # not written to: the CPU would write dirty lines back later
            began = time.perf_counter()
            call()
            wall = time.perf_counter() - began
            return wall, wall
        torch.cuda.synchronize()
        if cold:
            self.evicting.zero_()
            torch.cuda._sleep(int(CYCLES * min(4 * HEAD_START, 1.5 * self.launching.get(call, HEAD_START))))
        began = time.perf_counter()
        self.began.record()
        call()
        self.ended.record()
        launched = time.perf_counter() - began
        torch.cuda.synchronize()
        wall, device = time.perf_counter() - began, self.began.elapsed_time(self.ended) / 1e3
        if not cold:
            return wall, device
        self.launching[call] = launched
        return device, device

    def interleaved(
        self,
        contenders: dict[str, Contender],
        first: dict[str, float],
        cold: bool,
        budget: float,
        min_rounds: int,
        gauge: Callable[[], Ceilings],
    ) -> Rounds:
        """Rounds A B, B A, A B: `min_rounds`, unless they would take longer than PATIENCE seconds, and more until
        `budget` seconds are spent. `gauge` comes before the first contender or, backwards, after it: the rates are
        those of the moment when that one ran. Each round calls the quick contenders several times. Every contender has
        been called before, which took `first` seconds; one that raises is out."""
        left, rounds = dict(contenders), Rounds({name: Samples() for name in contenders})

        def timed(name: str, calls: int) -> list[tuple[float, float]]:
            try:
                return [self.seconds(left[name].call, left[name].before, cold) for _ in range(calls)]
            except Exception as failure:
                rounds.failed[name] = f"{type(failure).__name__}: {failure}"
                del left[name], rounds.samples[name]
                return []

        warm = {name: first[name] for name in contenders}
        for name in contenders:
            if warm[name] <= ROUND and (again := timed(name, 1)):
                warm[name] = again[0][0]
        fill = min(ROUND, max(warm.values()))
        calls = {name: min(20, max(1, round(fill / seconds))) for name, seconds in warm.items()}
        began, spent = time.perf_counter(), 0.0
        while left and (
            not rounds.ceilings or spent < budget or (len(rounds.ceilings) < min_rounds and spent < PATIENCE)
        ):
            backwards = len(rounds.ceilings) % 2
            if not backwards:
                rounds.ceilings.append(gauge())
            for name in list(left)[:: -1 if backwards else 1]:
                if taken := timed(name, calls[name]):
                    walls, devices = zip(*taken, strict=True)
                    rounds.samples[name].wall.append(statistics.median(walls))
                    rounds.samples[name].device.append(statistics.median(devices))
            if backwards:
                rounds.ceilings.append(gauge())
            spent = time.perf_counter() - began
        return rounds


class Gauge:
    """Reads the machine's rates off plain PyTorch calls, on random data several times the caches: reading by the
    quicker of a sum and a dot product, copying, and a square matrix product in the dtype."""

    def __init__(self, clock: Clock, device: torch.device, dtype: torch.dtype, tiny: bool):
        on_gpu = device.type == "cuda"
        size = 1 << 20 if tiny else (1 << 30 if on_gpu else 64 << 20)
        side = 128 if tiny else (8192 if on_gpu else 2048)
        self.clock = clock
        self.x, self.y = (huge_pages.empty((size,), torch.float32, device).normal_() for _ in range(2))
        self.a, self.b, self.out = (huge_pages.empty((side, side), dtype, device).normal_() for _ in range(3))

    def __call__(self, calls: int = 2) -> Ceilings:
        """The best of so many calls each: a ceiling must not be low because one call was disturbed."""
        x, y = self.x, self.y

        def best(call: Callable) -> float:
            return min(self.clock.seconds(call)[1] for _ in range(calls))

        reading = min(best(x.sum), best(lambda: torch.dot(x, x)))
        copying = best(lambda: y.copy_(x))
        multiplying = best(lambda: torch.mm(self.a, self.b, out=self.out))
        return Ceilings(x.nbytes / reading, 2 * x.nbytes / copying, 2 * len(self.a) ** 3 / multiplying)


@dataclass(frozen=True)
class Footprint:
    """What one call takes: allocations, the most bytes held above what was there before, and on a GPU the sum of its
    kernels' times; and what it returned."""

    result: object
    allocations: int
    peak_bytes: int
    kernel_seconds: float | None


def footprint(contender: Contender, device: torch.device) -> Footprint:
    """Profile one call; nothing of it enters the timings."""
    contender.before()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, made = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    with profile(activities=activities, profile_memory=device.type == "cpu") as profiler:
        result = contender.call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        events = (event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)
        kernels = sum(event.self_device_time_total for event in events)
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - made
        return Footprint(result, made, torch.cuda.max_memory_allocated() - held, kernels / 1e6)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = held = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return Footprint(result, sum(change > 0 for change in changes), peak, None)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative Frobenius error of the parts; infinite where a number is not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"output: expected shape {list(b.shape)}, got {list(a.shape)}")
        error = ((a.to(b.device).double() - b.double()).norm() / b.double().norm()).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def machine(device: torch.device) -> str:
    """The processor's model and threads, or the GPU's name. Virtual machines often hide the model's name, not its
    family and number."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    # Reversed, so that the first processor's lines are what remains.
    first = {key.strip(): value.strip() for key, _, value in reversed([line.partition(":") for line in lines])}
    name = first.get("model name") or platform.processor() or platform.machine()
    kind = f" (family {first['cpu family']}, model {first['model']})" if "cpu family" in first else ""
    return f"{name}{kind}, {torch.get_num_threads()} threads"


def commit() -> tuple[str, bool]:
    """The commit of this tree, and whether tracked files differ from it, results and report aside. A copy without .git
    is what MEMKERNEL_COMMIT says that it is."""
    if told := os.environ.get("MEMKERNEL_COMMIT"):
        return told, False
    root = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD"), bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*.jsonl", ":!*.md", ":!*.png")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
