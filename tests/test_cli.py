"""The command line: what it prints, what it leaves behind, and how it fails."""

import builtins
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import safetensors
import torch

from memkernel import Engine, __version__, cuda, demo, devices, huge_pages, memory_file, native, ops, tiny
from memkernel.cli import main
from memkernel.config import ModelConfig
from memkernel.training import facts, words
from memkernel.weights import expected_shapes

CPU = ["--device", "cpu", "--dtype", "float32"]
TEXT = "David said that he likes apples, and that he does not like pears. "
RIGHT = 11  # of the demo's twelve answers
COMMANDS = ("demo", "update", "ask", "chat", "info", "env")


@pytest.fixture
def run(capsys):
    """Call `main` and return (exit code, stdout, stderr)."""

    def call(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def memory(run, folder, tmp_path):
    """A memory file of the checkpoint `folder` after one update."""
    path = tmp_path / "david.memory"
    assert run("update", folder, "--memory", path, "--text", TEXT, *CPU)[0] == 0
    return path


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of float32 tensors whose data is a hole that takes no disk; returns its size."""
    header, at = {}, 0
    for name, shape in shapes.items():
        kind, item = ("U8", 1) if name == "initialized" else ("F32", 4)
        end = at + item * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + at)
    return 8 + len(encoded) + at


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_and_version_do_without_torch():
    script = f"""
import contextlib, io, sys
from memkernel.cli import main
for argv in [["--help"], ["--version"], *([name, "--help"] for name in {COMMANDS})]:
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(argv)
    except SystemExit as ended:
        assert ended.code == 0 and out.getvalue(), argv
heavy = {{"torch", "numpy", "transformers", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "memkernel", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"memkernel {__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


# -- update -----------------------------------------------------------------------------------------------------------


def test_update_makes_then_continues_the_memory(run, folder, tmp_path):
    path, text = tmp_path / "m", tmp_path / "text"
    text.write_text(TEXT)
    code, out, _ = run("update", folder, text, "--memory", path, "--json", *CPU)
    facts = json.loads(out)
    assert code == 0 and (facts["chunks"], facts["tokens"], facts["updates"]) == (1, len(TEXT), 1)
    assert facts["bytes"] == path.stat().st_size and facts["tokens_per_second"] > 0
    code, out, _ = run("update", folder, text, text, "--memory", path, *CPU)
    assert code == 0 and "updates" in out

    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    engine.update([TEXT] * 3)
    saved = memory_file.load(path)[0]
    assert memory_file.header(path)[0]["step"] == "3"
    assert torch.equal(saved["key"], engine.memory.key) and torch.equal(saved["rank"], engine.memory.rank)


def test_update_from_stdin_and_files_after_options(run, folder, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(TEXT * 2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    code, out, _ = run("update", folder, "--memory", tmp_path / "m", "--json", *CPU, "-", text)
    assert code == 0 and json.loads(out)["tokens"] == 3 * len(TEXT)


def test_short_text_warns_in_one_line(run, folder, tmp_path):
    code, _, err = run("update", folder, "--memory", tmp_path / "m", "--text", "short", *CPU)
    assert code == 0 and err.startswith("memkernel: warning: text of 5 tokens") and err.count("\n") == 1


def test_interrupted_update_leaves_the_file(run, folder, memory, monkeypatch):
    before, update = memory.read_bytes(), Engine.update

    def interrupted(self, text):
        update(self, text)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "update", interrupted)
    code, out, err = run("update", folder, "--memory", memory, "--text", TEXT, *CPU)
    assert (code, out, err) == (130, "", "memkernel: interrupted\n")
    assert memory.read_bytes() == before and not list(memory.parent.glob(".*"))


# -- ask --------------------------------------------------------------------------------------------------------------


def test_ask_answers_from_the_memory(run, folder, memory):
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    without = engine.generate("Who?", max_tokens=6)
    engine.memory.load(memory)
    want = engine.generate("Who?", max_tokens=6)
    assert want.token_ids != without.token_ids  # else the test below could not fail

    argv = ["ask", folder, "Who?", "--max-tokens", 6, *CPU]
    code, out, err = run(*argv, "--memory", memory, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert (facts["question"], facts["updates"], facts["finish_reason"]) == ("Who?", 1, want.finish_reason)
    assert facts["token_ids"] == want.token_ids and facts["text"] == want.text
    assert facts["logprobs"] == pytest.approx(want.logprobs)
    assert run(*argv, "--memory", memory)[:2] == (0, want.text + "\n")
    code, out, _ = run(*argv, "--json")
    assert json.loads(out)["token_ids"] == without.token_ids and json.loads(out)["updates"] == 0


def test_ask_samples_and_takes_the_chat_template(run, folder, memory):
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    engine.memory.load(memory)
    sampling = {"max_tokens": 6, "temperature": 0.9, "top_k": 50, "top_p": 0.8, "seed": 3}
    want = engine.chat([{"role": "user", "content": "Who?"}], **sampling)
    plain = engine.generate("Who?", **sampling)
    assert max(abs(a - b) for a, b in zip(want.logprobs, plain.logprobs, strict=True)) > 1e-3  # the template matters
    options = [word for name, value in sampling.items() for word in ("--" + name.replace("_", "-"), value)]
    _, out, _ = run("ask", folder, "--chat", *options, "--memory", memory, "--json", *CPU, "Who?")
    assert json.loads(out)["token_ids"] == want.token_ids
    assert json.loads(out)["logprobs"] == pytest.approx(want.logprobs, abs=1e-5)


# -- chat -------------------------------------------------------------------------------------------------------------


def script_input(monkeypatch, *lines):
    """`input` gives the lines, raises those that are exceptions, and then ends the file."""
    script = iter(lines)

    def read(prompt):
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def test_chat_remembers_saves_and_survives_mistakes(run, folder, tmp_path, monkeypatch):
    path = tmp_path / "m"
    lines = [f"/remember {TEXT}", "Who?", "/remember", "/nonsense", f"/save {tmp_path / 'none' / 'm'}", "/save", ""]
    script_input(monkeypatch, *lines, KeyboardInterrupt, "/quit", "not reached")
    code, out, err = run("chat", folder, "--memory", path, "--max-tokens", 4, *CPU)
    assert (code, err) == (0, "")
    assert f"remembered {len(TEXT.strip())} tokens, 1 updates so far" in out and f"saved {path}" in out
    assert out.count("error: ") == 3 and "error: /nonsense" in out
    assert memory_file.header(path)[0]["step"] == "1"

    script_input(monkeypatch, f"/remember {TEXT}", "/save")  # the saved memory is where a second chat starts
    assert run("chat", folder, "--memory", path, *CPU)[0] == 0
    assert memory_file.header(path)[0]["step"] == "2"


def test_chat_keeps_the_conversation_and_what_an_interrupted_answer_showed(run, folder, monkeypatch):
    seen = []

    def stream(self, messages, **sampling):
        seen.append(messages)
        yield "one "
        if len(seen) == 1:
            raise KeyboardInterrupt
        yield "two"

    monkeypatch.setattr(Engine, "stream", stream)
    script_input(monkeypatch, "A?", "B?", "C?")
    code, out, _ = run("chat", folder, *CPU)
    assert code == 0 and "one \none two\none two\n" in out
    said = [message["content"] for message in seen[-1]]
    assert said == ["A?", "one ", "B?", "one two", "C?"]
    assert [message["role"] for message in seen[-1]] == ["user", "assistant"] * 2 + ["user"]


def test_chat_reads_a_pipe(folder):
    command = [sys.executable, "-m", "memkernel", "chat", str(folder), "--max-tokens", "4", *CPU]
    done = subprocess.run(command, input=f"/remember {TEXT}\nWho?\n", capture_output=True, text=True)
    assert done.returncode == 0 and "1 updates so far" in done.stdout and done.stderr == ""


# -- info and env -----------------------------------------------------------------------------------------------------


def test_info_of_a_huge_checkpoint_reads_headers_only(run, tmp_path, monkeypatch):
    config = tiny.MEMORYLLM | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_blocks": 50, "num_tokens": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(ModelConfig.from_dict(config))
    parts = {"a.safetensors": dict(list(shapes.items())[::2]), "b.safetensors": dict(list(shapes.items())[1::2])}
    size = sum(write_sparse(tmp_path / file, part) for file, part in parts.items())
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    def no_data(*args, **kwargs):
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(safetensors.torch, "load_file", no_data)
    monkeypatch.setattr("memkernel.weights.Checkpoint.read", no_data)
    monkeypatch.setattr("memkernel.weights.Checkpoint.blocks", no_data)
    code, out, err = run("info", tmp_path, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["bytes"] == size > 2**34 and facts["shards"] == 2 and facts["tensors"] == len(shapes)
    assert facts["dtypes"] == {"F32": len(shapes) - 1, "U8": 1}
    assert facts["config"]["memory_rows"] == 12800 and facts["memory_bfloat16_bytes"] == 1_677_721_600
    code, out, _ = run("info", tmp_path)
    assert code == 0 and "1,677,721,600" in out and "12,800" in out


def test_info_of_a_memory_file(run, folder, memory):
    code, out, _ = run("info", memory, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["bytes"] == memory.stat().st_size
    assert facts["metadata"]["step"] == "1" and facts["metadata"]["rows"] == "128"
    assert facts["tensors"]["key"] == "F32 [3, 128, 2, 16]" and facts["tensors"]["rank"] == "I32 [3, 128]"
    assert "F32 [3, 128, 2, 16]" in run("info", memory)[1]


def test_env_says_what_was_chosen_and_what_runs(run, monkeypatch):
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "the environment")
    code, out, err = run("env", "--device", "cpu", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["memkernel"] == __version__ and facts["device"] == "cpu" and facts["environment"] == "the environment"
    assert (
        facts["dtype"] in facts["chosen"] and "bfloat16 instructions" in facts["chosen"] or "native" in facts["chosen"]
    )
    assert {"memory_attention", "memory_write_", "draw_ranks"} <= set(facts["ops"]) <= set(vars(ops))
    assert json.loads(run("env", *CPU, "--json")[1])["chosen"] == "as asked"


def test_env_tells_a_native_kernel_from_the_reference(run, monkeypatch):
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "the environment")
    facts = json.loads(run("env", *CPU, "--json")[1])
    assert facts["huge pages"] == huge_pages.setting()
    assert facts["cpu kernels"] == (native.WHY_NOT or f"{native.isa()}, of {', '.join(native.isas())}")
    assert facts["ops"]["swiglu"] == ("CPU kernel" if native.isas() else "reference (plain PyTorch)")


def test_env_says_which_cuda_kernels_there_are(run, monkeypatch):
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "the environment")
    assert "cuda kernels" not in json.loads(run("env", *CPU, "--json")[1]) or torch.cuda.is_available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    facts = json.loads(run("env", *CPU, "--json")[1])
    assert facts["cuda kernels"] == (ops.WHY_NO_TRITON or f"triton {metadata.version('triton')}")
    assert facts["cuda c++ write"] == (cuda.WHY_NOT or "built; memkernel.cuda.draw_and_write_")


def test_without_the_extension_the_ops_are_the_reference():
    script = """
import sys
sys.modules["memkernel._C"] = None
import torch
from memkernel import native, ops, reference
x = torch.randn(3, 64)
assert torch.equal(ops.swiglu(x), reference.swiglu(x)) and native.isas() == [] and native.isa() is None
print(native.WHY_NOT)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the extension was not built: ")


def test_a_failed_build_leaves_its_reason_and_no_older_one(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    root = Path(__file__).parent.parent
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    for folder in ("csrc", "memkernel"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "small"))
    stale = tmp_path / "memkernel/_cuda.failed.txt"
    stale.write_text("of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-lib", "build/lib"]
    missing = str(tmp_path / "no-compiler")
    environment = os.environ | {"CC": missing, "CXX": missing}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for folder in (tmp_path / "memkernel", tmp_path / "build/lib/memkernel"):
        monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
        monkeypatch.setattr(native, "find_spec", lambda name: None)
        assert missing in native.why_not("_C", ImportError(), "it needs luck")
        assert native.why_not("_cuda", ImportError(), "it needs luck") == "the extension was not built: it needs luck"


@pytest.mark.parametrize(
    "capabilities, isas, has",
    [
        ({}, ["portable"], False),
        ({}, ["avx512_bf16"], True),
        ({"amx_bf16": True}, [], True),
        ({"bf16": False}, [], False),
    ],
)
def test_which_processors_multiply_bfloat16(capabilities, isas, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(native, "isas", lambda: isas)
    assert devices.cpu_has_bfloat16() is has


def test_a_closed_pipe_is_no_error(folder):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        command = [sys.executable, "-m", "memkernel", "info", str(folder)]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_files_and_arguments(run, folder, memory, tmp_path):
    empty, binary, other = tmp_path / "empty", tmp_path / "binary", tiny.write_checkpoint(tmp_path / "other", seed=1)
    empty.write_bytes(b"")
    binary.write_bytes(b"\xff\xfe\xff")
    cut = tmp_path / "cut"
    cut.write_bytes(memory.read_bytes()[:-100])
    (tmp_path / "folder").mkdir()
    new = tmp_path / "new"
    update, ask = ["update", folder, "--memory", new], ["ask", folder, "Who?"]
    for argv, said in (
        (["ask", tmp_path / "none", "Who?"], "none: expected a checkpoint folder or a hub id"),
        (["ask", tmp_path / "folder", "Who?"], "config.json"),
        ([*ask, "--memory", new], "new: expected a memory file, found none"),
        ([*ask, "--memory", binary], "binary: expected a whole memory file"),
        ([*ask, "--memory", cut], "cut: expected a whole memory file"),
        ([*ask, "--memory", folder / "model.safetensors"], "format"),
        (["ask", other, "Who?", "--memory", memory], "fingerprint"),
        ([*ask, "--temperature", "-1"], "temperature: expected a number"),
        ([*ask, "--dtype", "int8"], "dtype: expected 'auto'"),
        ([*ask, "--device", "abacus"], "device: expected 'auto'"),
        (["ask", folder, ""], "prompt: expected text"),
        (["ask", other, "Who?"], "prompt: text needs a tokenizer"),
        (["chat", other], "chat template"),
        (update, "FILES: expected files or --text, one of them, got neither"),
        ([*update, "--text", TEXT, empty], "got both"),
        ([*update, tmp_path / "none"], "none: expected a file of UTF-8 text"),
        ([*update, binary], "binary: expected a file of UTF-8 text"),
        ([*update, empty], "empty: expected text"),
        (["update", folder, "--memory", tmp_path / "none" / "m", "--text", TEXT], "--memory: expected a file name"),
        (["info", tmp_path / "none"], "PATH: expected a checkpoint folder or a memory file"),
        (["info", tmp_path / "folder"], "config.json"),
        (["info", binary], "binary: expected a whole memory file"),
        (["demo", tmp_path / "none"], "none: expected a file of UTF-8 text"),
    ):
        machine = [] if argv[0] == "info" or "--dtype" in argv or "--device" in argv else CPU
        code, out, err = run(*argv, *machine)
        last = err.splitlines()[-1] if argv[0] != "chat" else err
        assert code == 2 and out == "" and said in last and last.startswith("memkernel: error: "), (argv, err)
        assert "Traceback" not in err and not new.exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["ask", "folder", "Who?", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["ask", "folder", "Who?", "more"], "unrecognized arguments: more"),
        (["update", "folder", "file"], "--memory"),
        (["update", "folder", "--memory", "m", "file", "--mem", "x"], "unrecognized arguments"),
        (["ask", "folder", "Who?", "--seed", "x"], "--seed"),
    ],
)
def test_wrong_command_lines(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and said in err


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo(run):
    """Training has seen none of the page's names and values."""
    sentences = re.findall(r"\S[^.]*\.", demo.PAGE.read_text())
    told = [facts.read(sentence) for sentence in sentences]
    assert len(told) == 12 and all(words.is_held_out(fact.subject) and words.is_held_out(fact.value) for fact in told)
    code, out, _ = run("demo", "--json", *CPU)
    report = json.loads(out)
    asked = [(row["before"] == row["expected"], row["after"] == row["expected"]) for row in report["answers"]]
    assert code == 0 and report["reload"]["equal"] is True and report["facts"] == len(asked) == 12
    assert sum(before for before, _ in asked) <= 1 and sum(after for _, after in asked) >= RIGHT
    fading = {row["t"]: row["recall"] for row in report["fading"]}
    assert list(fading) == list(demo.LATER) and fading[0] >= RIGHT / 12 and fading[32] < fading[0] / 2


def test_demo_tells_the_facts_of_a_file(run, tmp_path):
    page = tmp_path / "page"
    page.write_text("It rained. Mila lives in Dresden.\nThe mayor of Bilbao is Ramona. Now Mila lives in Tampere.")
    code, out, _ = run("demo", "--json", page, *CPU)
    report = json.loads(out)
    assert [row["expected"] for row in report["answers"]] == ["Tampere", "Ramona"]
    assert " ".join(report["chunks"]).startswith("It rained. Mila lives in Dresden.")
    page.write_text("It rained.")
    code, out, err = run("demo", page, *CPU)
    assert (
        code == 2
        and out == ""
        and f"files: expected a fact, such as 'Mila lives in Dresden.', got none in {page}" in err
    )


def test_demo_fails_if_the_second_process_answers_otherwise(run, monkeypatch):
    answer = json.dumps({"token_ids": [1], "text": "x"})
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, answer, ""))
    code, out, _ = run("demo", *CPU)
    assert code == 1 and "NOT EQUAL" in out and out.isascii()
