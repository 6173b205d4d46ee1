"""`memkernel eval`: the evaluations on the command line. torch is imported when one runs."""

import argparse
import random
import sys
from itertools import cycle
from pathlib import Path

FORMATS = ("generated", "page", "squad", "nq")
PUBLISHED_CHUNK = 512  # tokens that contexts are cut to, as published
GENERATED = 32  # cases, of each kind


def add_parser(commands) -> None:
    """Add `eval` and what it has below it to the subparsers of `memkernel`."""
    about = "measure what a model remembers"
    kinds = commands.add_parser("eval", help=about, description=about).add_subparsers(metavar="KIND", required=True)

    def add(run, text: str) -> argparse.ArgumentParser:
        command = kinds.add_parser(run.__name__.strip("_"), help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a hub id")
        command.add_argument("--cases", type=int, help="how many (default: 32 of each kind generated, all of a file)")
        command.add_argument("--seed", type=int, default=0, help="of generated cases, questions and side texts")
        command.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
        command.add_argument("--dtype", default="auto", help="auto (the default), float32, bfloat16, ...")
        command.add_argument("--json", action="store_true", help="report as one JSON object on stdout")
        command.add_argument("--plot", action="store_true", help="also draw KIND.png into the folder of --out")
        return command

    retention = add(_retention, "recall of facts right after they are told and after unrelated updates")
    retention.add_argument("--format", choices=FORMATS, default="generated", help="of --file (default: no file)")
    retention.add_argument("--file", help="a page in the sentences of training/facts.py; or questions and contexts")
    retention.add_argument("--unrelated", help="squad, nq: another such file, whose contexts are the unrelated updates")
    retention.add_argument("--later", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="updates until asked")
    edits = add(_edits, "efficacy, generalisation and specificity of edits")
    edits.add_argument("format", choices=("zsre", "counterfact"))
    edits.add_argument("file", help="edits in the layout of that data set")
    integrity = add(_integrity, "update without end, probing at every power of ten; goes on where it was interrupted")
    integrity.add_argument("--updates", type=int, required=True)
    for command in (retention, edits):
        command.add_argument("--out", type=Path, help="folder to write KIND.json into")
    integrity.add_argument("--out", type=Path, required=True, help="folder of the run: results and the memory")


def _check(args: argparse.Namespace) -> None:
    if args.cases is not None and args.cases < 1:
        raise ValueError(f"--cases: expected at least 1, got {args.cases}")
    if args.plot and args.out is None:
        raise ValueError("--plot: expected --out, the folder to draw into, got none")


def _engine(args: argparse.Namespace):
    from memkernel.engine import Engine

    engine = Engine.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype, seed=args.seed)
    if engine.tokenizer is None:
        raise ValueError(f"CHECKPOINT: expected one with a tokenizer, {args.checkpoint} has none")
    return engine


def _settings(args: argparse.Namespace, engine) -> dict:
    """What the figures of a report depend on, beside the checkpoint."""
    given = {name: getattr(args, name) for name in ("format", "file", "unrelated", "cases", "seed") if name in args}
    memory = engine.memory.key
    return given | {"device": str(memory.device), "dtype": str(memory.dtype).removeprefix("torch.")}


def _write(args: argparse.Namespace, kind: str, facts: dict) -> None:
    from memkernel.evaluation.integrity import write_json

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"{kind}.json", facts)


def _show(args: argparse.Namespace, kind: str, facts: dict) -> None:
    """Draw and print a report that is written."""
    from memkernel.cli import report
    from memkernel.evaluation import plots

    if args.plot:
        getattr(plots, kind)(facts, args.out / f"{kind}.png")
    report(facts, args.json)


def _progress(total: int):
    return lambda done: print(f"\r{done}/{total} cases", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _retention(args: argparse.Namespace) -> None:
    from memkernel.evaluation import cases, retention

    _check(args)
    if (args.file is None) != (args.format == "generated"):
        raise ValueError("--file: expected it with --format page, squad or nq, and only then")
    if (args.unrelated is None) != (args.format not in cases.RETENTION_FILES):
        raise ValueError("--unrelated: expected it with --format squad or nq, and only then")
    if min(args.later) < 0:
        raise ValueError(f"--later: expected numbers from 0 on, got {min(args.later)}")
    if args.unrelated is None:
        engine = _engine(args)
        count, longest = cases.counter(engine), 2 * engine.config.write_rows
        if args.file is None:
            args.cases = args.cases or GENERATED
            told = cases.generated(args.cases, longest, count, args.seed)
        else:
            told = cases.page(args.file, longest, count, args.seed)[: args.cases]
        known = frozenset(fact.subject for case in told for text in case.texts for fact in cases.stated(text))
        unrelated, match = cases.unrelated(longest, count, args.seed, known=known), retention.exact
    else:
        read = cases.RETENTION_FILES[args.format]
        told, others = read(args.file, args.cases), read(args.unrelated, 1000)
        engine = _engine(args)
        told = [cases.Case(tuple(_cut(engine, text) for text in c.texts), c.questions, c.kind) for c in told]
        unrelated = cycle([_cut(engine, text) for case in others for text in case.texts])
        match = retention.contains
    facts = retention.retention(engine, told, unrelated, tuple(args.later), match, progress=_progress(len(told)))
    facts = {"settings": _settings(args, engine)} | facts
    _write(args, "retention", facts)
    _show(args, "retention", facts)


def _cut(engine, text: str) -> str:
    ids = engine.tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= PUBLISHED_CHUNK else engine.tokenizer.decode(ids[:PUBLISHED_CHUNK])


def _edits(args: argparse.Namespace) -> None:
    from memkernel.evaluation import edits

    _check(args)
    if args.plot:
        raise ValueError("--plot: edits have no plot")
    made, engine = edits.FILES[args.format](args.file, args.cases), _engine(args)
    facts = edits.edits(engine, made, _progress(len(made)))
    facts = {"settings": _settings(args, engine)} | facts
    _write(args, "edits", facts)
    _show(args, "edits", facts)


def _integrity(args: argparse.Namespace) -> None:
    from memkernel.evaluation import cases, integrity

    _check(args)
    engine, args.cases = _engine(args), args.cases or GENERATED
    count, longest, rng = cases.counter(engine), 2 * engine.config.write_rows, random.Random(f"integrity {args.seed}")
    probed = [cases.several_facts(longest, count, rng) for _ in range(args.cases)]
    held_out = [cases.several_facts(longest, count, rng).texts[0] for _ in range(args.cases)]

    def text_at(begin: int):
        return cases.unrelated(longest, count, args.seed, begin)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    settings = _settings(args, engine)
    facts = integrity.integrity(engine, args.updates, text_at, probed, held_out, args.out, settings, say)
    _show(args, "integrity", facts)
