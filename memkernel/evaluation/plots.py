"""Results as PNG. matplotlib is optional: without it an evaluation still writes its JSON."""

from pathlib import Path


def _axes():
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot: it needs matplotlib, which is not installed: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def retention(facts: dict, path: str | Path) -> None:
    """Recall after t unrelated updates, its expectation, and the controls."""
    figure, axes = _axes()
    curve = facts["curve"]
    t = [point["t"] for point in curve]
    errors = [point["standard_error"] for point in curve]
    axes.errorbar(t, [point["recall"] for point in curve], yerr=errors, marker="o", capsize=2, label="recall")
    survival = "recall(0) (1 - {write_rows}/{memory_rows})$^t$".format(**facts)
    axes.plot(t, [point["theory"] for point in curve], "--", label=survival)
    for name in ("empty_memory", "foreign_memory"):
        if facts[name] is not None:
            axes.axhline(facts[name], linestyle=":", color="grey" if name == "empty_memory" else "black", label=name)
    axes.set(xlabel="unrelated updates t", ylabel="exact-match recall", ylim=(-0.02, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def integrity(facts: dict, path: str | Path) -> None:
    """Recall and perplexity over the number of updates, both on one logarithmic axis of updates."""
    figure, axes = _axes()
    updates = [probe["updates"] for probe in facts["probes"]]
    axes.plot(updates, [probe["recall"] for probe in facts["probes"]], marker="o", label="recall right after telling")
    axes.set(xlabel="updates", ylabel="exact-match recall", xscale="log", ylim=(-0.02, 1.02))
    other = axes.twinx()
    perplexity = [probe["perplexity"] for probe in facts["probes"]]
    other.plot(updates, perplexity, marker="s", color="tab:orange", label="perplexity of held-out text")
    other.set(ylabel="perplexity", ylim=(0, 1.5 * max(perplexity)))
    figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.12))
    figure.savefig(path, dpi=120)
