"""Runs a case: builds its contenders, compares their outputs with the truth, times them in turns, makes the rows."""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.report import OURS
from benchmarks.timing import Contender, commit, footprint, machine, relative_error
from memkernel import huge_pages

MIN_ROUNDS = 5


@dataclass
class Entry:
    """One contender's row of the results, and the seconds of its rounds."""

    group: str
    row: dict
    rounds: list[float] = field(default_factory=list)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20%, 50%, 80%."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


class Session:
    """The cases of one run of the benchmarks. Rows go to `rows` and, one JSON line each, to the file `results`."""

    def __init__(self, lab: Lab, results: Path | None, rows: list[dict]):
        self.lab, self.results, self.rows = lab, results, rows
        self.entries: dict[str, dict[str, Entry]] = {}
        device = lab.device
        self.common = {
            "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": machine(device),
            "device": device.type,
            "shape": lab.shape,
            "dtype": str(lab.dtype).removeprefix("torch."),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        if device.type == "cpu":
            self.common["huge_pages"] = huge_pages.setting()
        if device.type == "cuda":
            import triton

            self.common["versions"] |= {"cuda": torch.version.cuda, "triton": triton.__version__}
        self.common["commit"], self.common["dirty"] = commit()
        if lab.timed:
            ceilings = lab.ceilings
            self.common["ceilings"] = {
                "read_GB/s": ceilings.read / 1e9,
                "copy_GB/s": ceilings.copy / 1e9,
                "matmul_TFLOP/s": ceilings.matmul / 1e12,
            }

    def entry(self, workload: str, parameters: dict, contender: str, build) -> Entry:
        """The contender's part of the case, which is run when it is first asked for."""
        group = " ".join([workload, *(f"{k}={v}" for k, v in parameters.items())])
        if group not in self.entries:
            self.entries.clear()  # cases come one after another: what the last one held can go
            self.lab.release()
            self.entries[group] = self._run(group, workload, parameters, build(self.lab))
            self.lab.release()
        entry = self.entries[group][contender]
        self.rows.append(entry.row)
        if self.results is not None:
            with self.results.open("a") as file:
                file.write(json.dumps(entry.row) + "\n")
        return entry

    def _run(self, group: str, workload: str, parameters: dict, case: Case) -> dict[str, Entry]:
        entries, built, outputs, first = {}, {}, {}, {}
        for name, builder in case.builders.items():
            entry = entries[name] = Entry(group, {"workload": workload, **parameters, "contender": name} | self.common)
            if name in case.unavailable:
                entry.row["unavailable"] = case.unavailable[name]
                continue
            try:
                built[name] = builder()
                outputs[name], first[name], use = self._first_calls(built[name], case.once)
            except Exception as failure:  # a rival that breaks is named in its row, and the others go on
                self._breaks(entry, f"{type(failure).__name__}: {failure}")
                continue
            entry.row |= use
        self._compare(entries, outputs, case)
        ready = {name: built[name] for name in outputs if "refused" not in entries[name].row}
        outputs.clear()
        if self.lab.timed and ready:
            self._time(entries, ready, first, case)
        return entries

    def _breaks(self, entry: Entry, reason: str) -> None:
        entry.row["refused" if entry.row["contender"] == OURS else "unavailable"] = reason[:500]

    def _compare(self, entries: dict[str, Entry], outputs: dict[str, list[Tensor]], case: Case) -> None:
        """Refuse each contender whose output is not the truth's, or that there is no truth for."""
        truth = case.truth
        if isinstance(truth, tuple):
            truth = next((outputs[name] for name in truth if name in outputs), None)
        for name, output in outputs.items():
            row = entries[name].row
            if truth is None:
                row["refused"] = f"nothing to compare its output with: {' and '.join(case.truth)} did not run"
                continue
            try:
                row |= {"error": relative_error(output, truth), "error_bound": case.bound}
            except ValueError as wrong:  # a shape, or too few parts
                row["refused"] = str(wrong)
                continue
            if not row["error"] <= case.bound:
                row["refused"] = (
                    f"its output differs by {row['error']:.1e} from the truth, the bound is {case.bound:.0e}"
                )

    def _first_calls(self, contender: Contender, once: bool) -> tuple[list[Tensor], float, dict]:
        """What is compared with the truth, the seconds of the first call, which is a warm-up, and what it took."""
        use, seconds, row = None, float("inf"), {}
        if not once:
            contender.before()
            began = time.perf_counter()
            use = footprint(contender, self.lab.device)
            seconds = time.perf_counter() - began
            row = {"allocations": use.allocations, "peak_bytes": use.peak_bytes}
            row |= {"kernel_s": use.kernel_seconds} if use.kernel_seconds is not None else {}
        contender.before()
        return (contender.output() if contender.output else use.result), seconds, row

    def _time(
        self, entries: dict[str, Entry], ready: dict[str, Contender], first: dict[str, float], case: Case
    ) -> None:
        brief = case.once or self.lab.shape == "tiny"
        budget, min_rounds = (0.0, 1) if brief else (case.budget, MIN_ROUNDS)
        rounds = self.lab.clock.interleaved(ready, first, case.cold, budget, min_rounds, self.lab.gauge)
        for name, reason in rounds.failed.items():
            self._breaks(entries[name], f"while it was timed: {reason}")
        if not rounds.samples:
            return
        least, bounds = zip(*(ceilings.seconds(case.work) for ceilings in rounds.ceilings), strict=True)
        for name, taken in rounds.samples.items():
            low, median, high = quantiles(taken.wall)
            entry = entries[name]
            entry.rounds = taken.wall
            entry.row |= {"median_s": median, "p20_s": low, "p80_s": high, "rounds": len(taken.wall)}
            entry.row |= {"device_s": statistics.median(taken.device)} if self.lab.clock.on_gpu else {}
            entry.row |= {"configuration": ready[name].configuration} if ready[name].configuration else {}
            entry.row |= {"bytes": case.work.read + case.work.written, "flop": case.work.flop}
            entry.row |= {"ceiling_s": statistics.median(least), "bound_by": statistics.mode(bounds)}
            # Medians of each round's pair: what slows the machine down for a while slows both.
            entry.row["share"] = _median_ratio(least, taken.wall)
            if OURS in rounds.samples:
                entry.row["ratio"] = _median_ratio(taken.wall, rounds.samples[OURS].wall)


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
