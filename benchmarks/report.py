"""Tables and pictures from the rows of `results.jsonl`: the summary of a run, `report.md` and the README's numbers.

`python -m benchmarks.report` (or `make report`) rewrites both files from the newest run of each machine; nothing in
them is typed by hand.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
OURS = "memkernel"
BEGIN, END = "<!-- numbers: begin, written by `make report` -->", "<!-- numbers: end -->"
# The README's block: workload, what a case must have, and what to call it.
HEADLINES = [
    ("update", {"T": 512}, "update of 512 tokens"),
    ("write", {"M": 12800}, "its write into the pools alone"),
    ("first token", {"T": 64}, "first token of a 64-token prompt"),
    ("decode", {"B": 1}, "decode step, one sequence"),
    ("decode", {"B": 8}, "decode step, 8 sequences on one memory"),
    ("document and questions", {}, "10,000 tokens in, 20 questions answered"),
]
META = {"workload", "contender", "run", "machine", "device", "shape", "dtype", "versions", "commit", "dirty"}
PARAMETERS = ("T", "B", "M")


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def parameters(row: dict) -> dict:
    return {name: row[name] for name in PARAMETERS if name in row}


def case_of(row: dict) -> str:
    return " ".join([row["workload"], *(f"{name} {value:,}" for name, value in parameters(row).items())])


def seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def megabytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:,.0f} KiB"


def cells(row: dict) -> list[str]:
    """One row of the table, under COLUMNS."""
    name = row["contender"] + (f" ({row['configuration']})" if "configuration" in row else "")
    reason = row.get("refused") or row.get("unavailable")
    if reason:
        return [name, ("refused: " if "refused" in row else "does not run: ") + " ".join(reason.split())[:100]]
    on_device = " / ".join(seconds(row[name]) for name in ("device_s", "kernel_s") if name in row)
    bound = f"{row['share']:.0%} of {row['bound_by']}" if row["ceiling_s"] else ""
    return [
        name,
        seconds(row["median_s"]),
        f"{seconds(row['p20_s'])} - {seconds(row['p80_s'])}" if row["rounds"] > 1 else "one round",
        on_device,
        bound,
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        megabytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        str(row.get("allocations", "")),
        f"{row['error']:.0e}",
    ]


COLUMNS = ["", "median", "p20 - p80", "device / kernels", "ceiling", "time / ours", "peak", "allocations", "error"]


def header(rows: list[dict]) -> str:
    """The machine, what was measured on it and when, and its ceilings."""
    runs, row = sorted({row["run"] for row in rows}), max(rows, key=lambda row: row["run"])
    ceilings = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in row["ceilings"].items())
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    dirty = " with uncommitted changes" if row["dirty"] else ""
    return (
        f"{row['machine']}; shape {row['shape']}, {row['dtype']}; {versions}; commit {row['commit']}{dirty}; "
        f"{' and '.join(runs)}\nmeasured in the {'last' if len(runs) > 1 else 'same'} run: {ceilings}"
    )


def by_case(rows: list[dict]) -> dict[str, list[dict]]:
    cases = defaultdict(list)
    for row in rows:
        cases[case_of(row)].append(row)
    return cases


def ceiling_line(rows: list[dict]) -> str:
    """Bytes, FLOP and the least time of a case."""
    timed = next((row for row in rows if row.get("ceiling_s")), None)
    if timed is None:
        return ""
    return f"{timed['bytes'] / 1e9:.3g} GB, {timed['flop'] / 1e9:.3g} GFLOP: at least {seconds(timed['ceiling_s'])}"


def table(rows: list[dict]) -> str:
    """The plain-text summary of one run."""
    lines = [header(rows)]
    body = {case: [cells(row) for row in some] for case, some in by_case(rows).items()}
    whole = [line for some in body.values() for line in some if len(line) == len(COLUMNS)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *whole, strict=True)]
    for case, some in by_case(rows).items():
        lines += ["", f"{case}   {ceiling_line(some)}"]
        for line in [COLUMNS, *body[case]]:
            if len(line) == len(COLUMNS):
                lines.append(
                    "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                )
            else:
                lines.append("  " + line[0].ljust(widths[0]) + "  " + line[1])
    return "\n".join(lines)


def newest_runs(rows: list[dict]) -> list[list[dict]]:
    """For each machine, device, shape and dtype, the newest row of each contender of each case, if its code is that of
    the newest row of all: figures of different commits, or with and without uncommitted changes, do not stand side by
    side."""
    machines = defaultdict(dict)
    for row in rows:  # appended in order of time
        machines[row["machine"], row["device"], row["shape"], row["dtype"]][case_of(row), row["contender"]] = row
    newest = []
    for kept in machines.values():
        last = max(kept.values(), key=lambda row: row["run"])
        code = last["commit"], last["dirty"]
        newest.append([row for row in kept.values() if (row["commit"], row["dirty"]) == code])
    return newest


def markdown_table(rows: list[dict]) -> list[str]:
    """One case as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        shown = cells(row)
        shown += [""] * (len(COLUMNS) - len(shown))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in shown) + " |")
    return lines


def multiple(row: dict) -> str:
    """A rival's time over ours, or why there is none."""
    if "ratio" not in row:
        return "refused" if "refused" in row else "does not run"
    return f"{row['ratio']:.{1 if row['ratio'] < 10 else 0}f} x"


def readme_block(rows: list[dict]) -> list[str]:
    """The headline cases of one machine: ours, the share of the ceiling, and the rivals as multiples of ours."""
    cases, lines, rivals = by_case(rows), [], ("published", "transformers")
    for workload, wanted, title in HEADLINES:
        some = next((c for c in cases.values() if c[0]["workload"] == workload and parameters(c[0]) == wanted), [])
        timed = {row["contender"]: row for row in some if "median_s" in row}
        if OURS not in timed:
            continue
        ours = timed[OURS]
        rows_of = {row["contender"]: row for row in some}
        times = [multiple(rows_of[name]) if name in rows_of else "" for name in rivals]
        share = f"{ours['share']:.0%} ({ours['bound_by']})"
        once = ", one round" if ours["rounds"] == 1 else ""
        lines.append(f"| {title} | {seconds(ours['median_s'])}{once} | {share} | {' | '.join(times)} |")
    if not lines:
        return []
    head = [
        "| | memkernel | share of the ceiling | published data flow | transformers |",
        "| --- | --- | --- | --- | --- |",
    ]
    return ["", header(rows).replace("\n", "; "), "", *head, *lines]


def plot_shares(rows: list[dict], path: Path) -> None:
    """Share of the ceiling that each contender reaches, a row per case."""
    plt = _pyplot()
    cases = {case: some for case, some in by_case(rows).items() if any(row.get("ceiling_s") for row in some)}
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(cases) + 1.2))
    for place, some in enumerate(reversed(cases.values())):
        for row in some:
            if "share" in row:
                axes.plot(row["share"], place, **_marker(row["contender"]), label=row["contender"], linestyle="")
    axes.set_yticks(range(len(cases)), list(reversed(cases)))
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("share of the ceiling (1: the machine's measured bandwidth or matrix rate)")
    _finish(figure, axes, path)


def plot_against(rows: list[dict], workload: str, parameter: str, label: str, path: Path) -> None:
    """Time of one workload against one of its parameters."""
    plt = _pyplot()
    lines = defaultdict(list)
    for row in rows:
        if row["workload"] == workload and "median_s" in row:
            lines[row["contender"]].append((row[parameter], row["median_s"], row["ceiling_s"]))
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for contender, points in lines.items():
        x, y, _ = zip(*sorted(points), strict=True)
        axes.plot(x, y, **_marker(contender), label=contender)
    points = sorted({(x, least) for some in lines.values() for x, _, least in some})
    axes.plot(*zip(*points, strict=True), color="black", linestyle=":", label="ceiling")
    axes.set_xscale("log", base=2)
    axes.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(f"{workload}, seconds")
    _finish(figure, axes, path)


def plot_roofline(rows: list[dict], path: Path) -> None:
    """FLOP/s reached against FLOP per byte, under the measured bandwidth and matrix rate."""
    plt = _pyplot()
    ceilings = rows[0]["ceilings"]
    bandwidth, rate = ceilings["read_GB/s"] * 1e9, ceilings["matmul_TFLOP/s"] * 1e12
    figure, axes = plt.subplots(figsize=(6, 3.6))
    intensities = [2**n for n in range(-3, 13)]
    axes.plot(intensities, [min(rate, bandwidth * x) for x in intensities], color="black", linewidth=0.8)
    for row in rows:
        if row.get("flop") and row["contender"] in (OURS, "published"):
            axes.plot(
                row["flop"] / row["bytes"],
                row["flop"] / row["median_s"],
                **_marker(row["contender"]),
                linestyle="",
                label=row["contender"],
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("FLOP needed per byte needed")
    axes.set_ylabel("FLOP/s (needed ones)")
    _finish(figure, axes, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# The same mark for a contender in every picture.
MARKS = (
    "memkernel",
    "published",
    "transformers",
    "reference",
    "sdpa",
    "sdpa-merged",
    "sdpa-cudnn",
    "flex",
    "cuda c++",
    "ordinary pages",
)


def _marker(contender: str) -> dict:
    place = MARKS.index(contender) if contender in MARKS else len(MARKS)
    return {"marker": "osD^vP*Xph<"[place], "color": f"C{place}", "markersize": 8 if contender == OURS else 5}


def _finish(figure, axes, path: Path) -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry per contender
    axes.legend(handles.values(), handles, fontsize=8, loc="best", framealpha=0.6)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)


def write_report(rows: list[dict], folder: Path) -> None:
    """report.md and its pictures from the newest run of each machine."""
    lines = ["# Benchmarks", "", "Written by `make report` from `results.jsonl`; the columns are explained below.", ""]
    for run in newest_runs(rows):
        stem = "-".join(run[0][key] for key in ("machine", "shape", "dtype"))
        stem = re.sub(r"[^a-z0-9]+", "-", stem.lower())
        lines += [f"## {run[0]['machine']}, {run[0]['shape']}", "", header(run).replace("\n", "  \n"), ""]
        pictures = {
            "shares": lambda path, run=run: plot_shares(run, path),
            "write": lambda path, run=run: plot_against(run, "write", "M", "memory rows M a layer", path),
            "decode": lambda path, run=run: plot_against(run, "decode", "B", "sequences on one memory", path),
            "first-token": lambda path, run=run: plot_against(run, "first token", "T", "prompt tokens", path),
            "roofline": lambda path, run=run: plot_roofline(run, path),
        }
        timed = [row for row in run if "median_s" in row]
        for name, draw in pictures.items():
            needs = {"write": "write", "decode": "decode", "first-token": "first token"}.get(name)
            if timed and (needs is None or any(row["workload"] == needs for row in timed)):
                (folder / "plots").mkdir(exist_ok=True)
                draw(folder / "plots" / f"{stem}-{name}.png")
                lines += [f"![{name}](plots/{stem}-{name}.png)", ""]
        for case, some in by_case(run).items():
            lines += [f"### {case}", "", ceiling_line(some), "", *markdown_table(some), ""]
    lines += [__doc__.split("\n\n")[0], "", *NOTES]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


NOTES = [
    "* median, p20 - p80: of the rounds; a round is the median of the calls in it, contenders take turns.",
    "* device / kernels: between two events on the GPU, and the sum of the kernels' times.",
    "* ceiling: least time, by the bytes and FLOP that the mathematics needs and the rates measured in the same round,",
    "  over the round's; the median over rounds. Memory or matrix says which rate sets it.",
    "* time / ours: median over rounds of the contender's time over memkernel's.",
    "* peak, allocations: of one call through PyTorch's allocator, above what was held before; the scratch of the CPU",
    "  kernels, which each thread keeps from call to call, is not among them.",
    "* ordinary pages: our kernel on pools in pages of the usual size. Our pools, the weights that all share, operands",
    "  of single ops and what the rates are measured on lie in pages of 2 MB where the system gives them; other codes'",
    "  pools and caches, and what a call allocates, do not.",
    "* error: relative Frobenius error against float64 for ops, against the published data flow for whole forwards.",
]


def agreement(rows: list[dict]) -> str:
    """How far the ratios of the newest two runs agree: a line per rival of a case, then how many do within 10%."""
    before, after = ({}, {})
    for run, kept in zip(sorted({row["run"] for row in rows})[-2:], (before, after), strict=True):
        kept |= {
            (row["machine"], row["shape"], case_of(row), row["contender"]): row for row in rows if row["run"] == run
        }
    both = [(before[key], row) for key, row in after.items() if "ratio" in row and "ratio" in before.get(key, {})]
    lines, close = [], 0
    for old, new in both:
        if new["contender"] != OURS:
            close += max(new["ratio"] / old["ratio"], old["ratio"] / new["ratio"]) <= 1.1
            lines.append(f"{case_of(new):28} {new['contender']:13} {old['ratio']:8.2f} {new['ratio']:8.2f}")
    return "\n".join([*lines, f"{close} of {len(lines)} ratios within 10%"])


def write_readme(rows: list[dict], readme: Path) -> None:
    """Replace the README's numbers block: for each kind of device, where its newest measured code was measured."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected one block between {BEGIN!r} and {END!r}")
    runs = newest_runs(rows)
    newest = {
        run[0]["device"]: run[0]["commit"] for run in sorted(runs, key=lambda run: max(row["run"] for row in run))
    }
    block = [line for run in runs if run[0]["commit"] == newest[run[0]["device"]] for line in readme_block(run)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text("\n".join([before + BEGIN, *block, "", END + after]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--text", type=Path, help="write only a plain-text table, to this file")
    parser.add_argument("--agreement", action="store_true", help="only compare the ratios of the newest two runs")
    arguments = parser.parse_args()
    rows = read(arguments.results)
    if arguments.agreement:
        print(agreement(rows))
        return
    if arguments.text:
        arguments.text.write_text("\n\n".join(map(table, newest_runs(rows))) + "\n")
        return
    write_report(rows, HERE)
    write_readme(rows, HERE.parent / "README.md")


if __name__ == "__main__":
    main()
