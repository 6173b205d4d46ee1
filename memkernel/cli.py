"""The command line. Nothing here imports torch before a command runs, so that help and errors come at once."""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from memkernel import __version__
from memkernel.evaluation import command as evaluation

SAMPLING = {  # options that `ask` and `chat` pass on to SamplingParams, whose defaults hold for what is not given
    "max_tokens": (int, "longest answer, in tokens"),
    "temperature": (float, "0, the default, always takes the likeliest token"),
    "top_k": (int, "choose among so many likeliest tokens"),
    "top_p": (float, "choose among the likeliest tokens that together have this probability"),
    "seed": (int, "makes a sampled answer reproducible"),
}
CHAT_HELP = """/remember TEXT  write TEXT into the memory
/save [PATH]    save the memory, by default to the file of --memory
/quit           end; so does Ctrl-D. Ctrl-C stops an answer."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for wrong arguments or files, 130 if interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse ends FILES at the first option; those that stand behind one are left in `rest`.
    if any(word.startswith("-") and word != "-" or "files" not in args for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    vars(args).get("files", []).extend(rest)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"memkernel: warning: {message}", file=sys.stderr)
            sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding lacks
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"memkernel: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("memkernel: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("memkernel", description="Self-updating language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"memkernel {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run, about: str, *positionals: tuple[str, str]) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__.strip("_"), help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=run)
        for name, text in positionals:
            command.add_argument(name, metavar=name.upper(), help=text, nargs="*" if name == "files" else None)
        if run is not _info:
            command.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
            command.add_argument("--dtype", default="auto", help="auto (the default), float32, bfloat16, ...")
        if run is not _chat:
            command.add_argument("--json", action="store_true", help="report as one JSON object on stdout")
        return command

    checkpoint = ("checkpoint", "a folder or a hub id")
    add(_demo, "tell the shipped model a page, ask, save and load", ("files", "pages (default: one that ships)"))
    update = add(_update, "write text into a memory file", checkpoint, ("files", "UTF-8 text files; - is stdin"))
    update.add_argument("--text", help="text to write instead of files")
    update.add_argument("--memory", metavar="PATH", required=True, help="file to update; if there is none, it is made")
    ask = add(_ask, "answer one question", checkpoint, ("question", "the prompt; it is continued as it stands"))
    ask.add_argument("--chat", action="store_true", help="put the question through the chat template")
    ask.add_argument("--memory", metavar="PATH", help="file to answer from (default: the checkpoint's own memory)")
    chat = add(_chat, "talk; the memory can be updated on the way", checkpoint)
    chat.formatter_class, chat.epilog = argparse.RawDescriptionHelpFormatter, CHAT_HELP
    chat.add_argument("--memory", metavar="PATH", help="file to start from, if there is one, and to save to")
    for command in (ask, chat):
        for name, (kind, text) in SAMPLING.items():
            command.add_argument("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=text)
    add(_info, "describe a checkpoint folder or a memory file from its headers", ("path", "the folder or the file"))
    add(_env, "describe this installation, for bug reports")
    evaluation.add_parser(commands)
    return parser


def _sampling(args: argparse.Namespace) -> dict:
    return {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


def _engine(args: argparse.Namespace, may_be_new: bool):
    """The checkpoint with the memory of --memory; a file that does not exist is an error unless it `may_be_new`."""
    from memkernel import memory_file
    from memkernel.engine import Engine

    path, known = args.memory, args.memory is not None and (Path(args.memory).exists() or not may_be_new)
    if known:
        memory_file.header(path)  # raises before a large model is loaded
    elif path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"--memory: expected a file name in an existing folder, got {path!r}")
    engine = Engine.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype)
    if known:
        engine.memory.load(path)
    return engine


def read_texts(files: list[str]) -> list[str]:
    """The contents of UTF-8 files, "-" being stdin. Raises ValueError naming the one that is not readable text."""
    texts = []
    for file in files:
        try:
            texts.append((sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected a file of UTF-8 text: {error}") from None
        if not texts[-1]:
            raise ValueError(f"{file}: expected text, found an empty file")
    return texts


def report(facts: dict, as_json: bool, indent: str = "") -> None:
    """Print facts as one JSON object, or as indented lines for a reader."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            print(indent + name)
            report(value, False, indent + "  ")
        else:
            form = {int: ",", float: ",.6g"}.get(type(value), "")
            print(f"{indent}{name:<{width}}  {format(value, form) if form else value}")


def _demo(args: argparse.Namespace) -> int:
    from memkernel import demo

    return demo.run(args.files, args.json, args.device, args.dtype)


def _update(args: argparse.Namespace) -> None:
    if bool(args.files) == (args.text is not None):
        raise ValueError(f"FILES: expected files or --text, one of them, got {'both' if args.files else 'neither'}")
    texts = read_texts(args.files) if args.files else [args.text]
    engine = _engine(args, may_be_new=True)
    update = engine.update(texts)
    engine.memory.save(args.memory)
    facts = {"chunks": update.chunks, "tokens": update.tokens, "seconds": update.seconds}
    facts |= {"tokens_per_second": update.tokens / update.seconds, "updates": update.version}
    report(facts | {"memory": args.memory, "bytes": Path(args.memory).stat().st_size}, args.json)


def _ask(args: argparse.Namespace) -> None:
    engine = _engine(args, may_be_new=False)
    prompt = [{"role": "user", "content": args.question}] if args.chat else args.question
    if not args.json:
        for piece in engine.stream(prompt, **_sampling(args)):
            print(piece, end="", flush=True)
        print()
        return
    facts = {"question": args.question, **asdict(engine.generate(prompt, **_sampling(args)))}
    del facts["top_logprobs"]  # there is no option that asks for them
    report(facts | {"updates": engine.memory.step if engine.config.has_memory else None}, args.json)


def _chat(args: argparse.Namespace) -> None:
    engine = _engine(args, may_be_new=True)
    if engine.tokenizer is None or not engine.tokenizer.chat_template:
        raise ValueError(f"CHECKPOINT: expected a tokenizer with a chat template, {args.checkpoint} has none")
    with contextlib.suppress(ImportError):  # some builds of Python lack it
        import readline  # noqa: F401 - gives input() history and editing
    print(CHAT_HELP)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                _obey(engine, line, args.memory)
            elif line:
                _answer(engine, messages, line, args)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def _obey(engine, line: str, memory_path: str | None) -> None:
    command, _, rest = line.partition(" ")
    if command == "/remember":
        update = engine.update(rest.strip())
        print(f"remembered {update.tokens} tokens, {update.version} updates so far")
    elif command == "/save":
        path = rest.strip() or memory_path
        if path is None:
            raise ValueError("PATH: expected a file name to save to, or --memory at the start, got neither")
        engine.memory.save(path)
        print(f"saved {path}")
    else:
        raise ValueError(f"{command}: expected one of\n{CHAT_HELP}")


def _answer(engine, messages: list[dict[str, str]], line: str, args: argparse.Namespace) -> None:
    """Answer the conversation and `line`; both are kept, the answer as far as it came if it is interrupted."""
    question, answer = {"role": "user", "content": line}, ""
    try:
        for piece in engine.stream([*messages, question], **_sampling(args)):
            answer += piece
            print(piece, end="", flush=True)
        print()
    finally:
        if answer:
            messages += [question, {"role": "assistant", "content": answer}]


def _info(args: argparse.Namespace) -> None:
    from memkernel import memory_file
    from memkernel.config import ModelConfig
    from memkernel.weights import Checkpoint

    path = Path(args.path)
    if not path.exists():
        raise ValueError(f"PATH: expected a checkpoint folder or a memory file, found none at {args.path!r}")
    if path.is_file():
        metadata, tensors = memory_file.header(path)
        tensors = {name: f"{dtype} {shape}" for name, (shape, dtype) in tensors.items()}
        report({"metadata": metadata, "tensors": tensors, "bytes": path.stat().st_size}, args.json)
        return
    config, checkpoint = ModelConfig.from_folder(path), Checkpoint(path)
    facts = {"config": asdict(config), "tensors": len(checkpoint.shapes), "shards": len(checkpoint.files)}
    facts["dtypes"] = Counter(checkpoint.dtypes.values())
    facts["bytes"] = sum((path / file).stat().st_size for file in checkpoint.files)
    row_bytes = 2 * 2 * config.num_kv_heads * config.head_size  # a key and a value in bfloat16
    facts["memory_bfloat16_bytes"] = config.num_layers * config.memory_rows * row_bytes
    report(facts, args.json)


def _env(args: argparse.Namespace) -> None:
    import torch
    from torch.utils import collect_env

    from memkernel import cuda, huge_pages, native, ops
    from memkernel.devices import choose

    device, dtype, chosen = choose(args.device, args.dtype)
    facts = {"memkernel": __version__, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    facts["chosen"] = chosen or "as asked"
    names = [name for name, op in vars(ops).items() if isinstance(op, torch._ops.OpOverload)]
    has_kernel, key = torch._C._dispatch_has_kernel_for_dispatch_key, device.type.upper()
    facts["cpu kernels"] = f"{native.isa()}, of {', '.join(native.isas())}" if native.isas() else native.WHY_NOT
    facts["huge pages"] = huge_pages.setting()
    if torch.cuda.is_available():
        facts["cuda kernels"] = ops.WHY_NO_TRITON or f"triton {sys.modules['triton'].__version__}"
        facts["cuda c++ write"] = cuda.WHY_NOT or "built; memkernel.cuda.draw_and_write_"
    native_names = [name for name in names if has_kernel(f"memkernel::{name}", key)]
    facts["ops"] = {name: f"{key} kernel" if name in native_names else "reference (plain PyTorch)" for name in names}
    report(facts | {"environment": collect_env.get_pretty_env_info()}, args.json)
