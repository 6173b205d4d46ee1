"""Runs a case: builds its contenders, compares their outputs with the truth, times them in turns, makes the rows."""

import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.lab import Case, Lab
from benchmarks.report import OURS
from benchmarks.timing import Contender, commit, footprint, machine, relative_error

MIN_ROUNDS = 3


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
        entries, ready, first, truth = {}, {}, {}, case.truth
        for name, builder in case.builders.items():
            entry = entries[name] = Entry(group, {"workload": workload, **parameters, "contender": name} | self.common)
            if name in case.unavailable:
                entry.row["unavailable"] = case.unavailable[name]
                continue
            try:
                contender = builder()
                output, first[name], use = self._first_calls(contender, case.once)
                truth = output if name == case.truth else truth
                error = relative_error(output, truth)
            except Exception as failure:  # a rival that breaks is named in its row, and the others go on
                entry.row["refused" if name == OURS else "unavailable"] = f"{type(failure).__name__}: {failure}"[:500]
                continue
            entry.row |= {"error": error, "error_bound": case.bound}
            if error <= case.bound:
                ready[name] = contender
                entry.row |= use
                entry.row |= {"configuration": contender.configuration} if contender.configuration else {}
            else:
                entry.row["refused"] = (
                    f"its output differs by {error:.1e} from the truth, the bound is {case.bound:.0e}"
                )
        if self.lab.timed and ready:
            self._time(entries, ready, first, case)
        return entries

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
        samples = self.lab.clock.interleaved(ready, first, case.cold, budget, min_rounds)
        least, bound_by = self.lab.ceilings.seconds(case.work)
        for name, taken in samples.items():
            low, median, high = quantiles(taken.wall)
            entry = entries[name]
            entry.rounds = taken.wall
            entry.row |= {"median_s": median, "p20_s": low, "p80_s": high, "rounds": len(taken.wall)}
            entry.row |= {"device_s": statistics.median(taken.device)} if self.lab.clock.on_gpu else {}
            entry.row |= {"bytes": case.work.read + case.work.written, "flop": case.work.flop}
            entry.row |= {"ceiling_s": least, "bound_by": bound_by, "share": least / median}
            if OURS in samples:  # the ratio of each round's pair, so that a drift of the machine cancels
                pairs = zip(taken.wall, samples[OURS].wall, strict=True)
                entry.row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
