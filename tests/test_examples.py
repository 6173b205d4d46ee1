"""The examples run, and what they claim is true."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import embed_in_torch, transformers_memory
from memkernel import tiny
from memkernel.ops import memory_attention

ROOT = Path(__file__).parent.parent


def test_the_module_that_embeds_the_ops_equals_sdpa(capsys):
    torch._dynamo.reset()
    assert embed_in_torch.main() < 1e-5
    assert capsys.readouterr().out.count("relative difference") == 4


def test_transformers_with_the_memory_gives_the_tokens_of_the_engine(capsys):
    ours, theirs = transformers_memory.main()
    assert ours == theirs and len(ours) == 24 and len(set(ours)) > 4
    assert capsys.readouterr().out.endswith("equal\n")


@pytest.mark.parametrize("bos", [True, False])
def test_transformers_with_adapters_and_scaled_rope(tmp_path, bos):
    """Of a checkpoint like the published 8B one it takes the read weights; without bos the cache begins empty."""
    adapters = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]}
    config = tiny.MEMORYLLM | {"add_bos_embedding": bos, "rope_scaling": {"type": "linear", "factor": 1.8125}}
    tiny.write_tokenizer(
        tiny.write_checkpoint(tmp_path, config | {"add_decoder_lora": True, "lora_config": adapters}, initialized=True)
    )
    ours, theirs = transformers_memory.main(tmp_path)
    assert ours == theirs


def test_the_comparison_with_transformers_can_fail(monkeypatch):
    def blind(query, memory_key, memory_value, *own):
        return memory_attention(query, memory_key[:, :-16], memory_value[:, :-16], *own)

    monkeypatch.setattr(transformers_memory, "memory_attention", blind)
    ours, theirs = transformers_memory.main()
    assert ours != theirs


def test_the_example_runs_as_a_script():
    command = [sys.executable, "examples/transformers_memory.py"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr
