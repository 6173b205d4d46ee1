"""Checkpoints: layouts and dtypes on disk, merged adapters, what is refused, fingerprints, peak memory, the hub."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from memkernel import Engine, reference, tiny, weights
from tests.compare import relative_error

FUSED = {"qkv": ["q_proj", "k_proj", "v_proj"], "o": ["o_proj"], "gate_up": ["gate_proj", "up_proj"]}
FUSED["down"] = ["down_proj"]
LORA = {"r": 4, "lora_alpha": 12, "target_modules": FUSED["qkv"] + FUSED["gate_up"]}
TARGETS = {"published": LORA["target_modules"], "all": sum(FUSED.values(), []), "v-and-down": ["v_proj", "down_proj"]}
MEMORYLLM = tiny.MEMORYLLM | {"lora_config": LORA, "add_decoder_lora": True}
LLAMA = {k: v for k, v in tiny.MEMORYLLM.items() if not k.startswith(("num_blocks", "num_tokens", "add_", "drop_"))}
TIED = LLAMA | {"tie_word_embeddings": True}
SINGLE, INDEX, FIRST = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00003.safetensors"


def load(folder, dtype=torch.float32):
    return Engine.from_pretrained(folder, device="cpu", dtype=dtype, keep_hidden=True)


def make(folder, config=MEMORYLLM, name=None, value=None):
    """A checkpoint with a shipped memory. `value` replaces the tensor `name`; a function makes it of the embedding; a
    number replaces its last element; without a value, all tensors with `name` in their names are left out."""
    tensors = load_file(tiny.write_checkpoint(folder, config, initialized=True) / SINGLE)
    if isinstance(value, float):
        tensors[name].view(-1)[-1] = value
    elif value is not None:
        tensors[name] = value(tensors[EMBEDDING]) if callable(value) else value
    elif name is not None:
        tensors = {key: tensor for key, tensor in tensors.items() if name not in key}
    save_file(tensors, folder / SINGLE)
    return tensors


def shard(folder):
    """Deal the tensors out to three files with an index, as published."""
    tensors = load_file(folder / SINGLE)
    home = {name: FIRST.replace("1", str(i % 3 + 1), 1) for i, name in enumerate(sorted(tensors))}
    for file in set(home.values()):
        save_file({name: tensors[name] for name in tensors if home[name] == file}, folder / file)
    (folder / SINGLE).unlink(), (folder / INDEX).write_text(json.dumps({"weight_map": home}))


def contents(part, name=""):
    """Name -> tensor, all that an engine computes with."""
    if isinstance(part, torch.Tensor):
        return {name: part}
    items = vars(part).items() if "memkernel.m" in repr(type(part)) else enumerate(part if type(part) is list else [])
    return {key: x for child, value in items for key, x in contents(value, f"{name}.{child}").items()}


def assert_same(engine, other):
    ours, theirs = ({**contents(e.model), **contents(e._memory)} for e in (engine, other))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("config", [LLAMA, TIED, MEMORYLLM], ids=["llama", "tied", "memoryllm"])
def test_shards_equal_one_file(tmp_path, config):
    if config is MEMORYLLM:
        make(tmp_path / "whole"), make(tmp_path / "shards"), shard(tmp_path / "shards")
    else:
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 3
    whole, engine = load(tmp_path / "whole"), load(tmp_path / "shards")
    assert_same(engine, whole)
    assert (engine.model.head is engine.model.embedding) == (config is TIED)
    assert config is not MEMORYLLM or engine.memory.fingerprint == whole.memory.fingerprint


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_same_numbers_in_another_dtype_on_disk(tmp_path, monkeypatch, stored):
    for folder, dtype in (("stored", stored), ("float32", torch.float32)):
        exact = {name: (x.clamp(-1.9, 1.9) * 64).round() / 64 for name, x in make(tmp_path / folder).items()}
        tensors = {name: x.to(dtype if x.ndim else torch.uint8) for name, x in exact.items()}
        save_file(tensors, tmp_path / folder / SINGLE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = load(tmp_path / "float32", dtype)
        assert torch.equal(whole.model.embedding, exact[EMBEDDING].to(dtype))
        with monkeypatch.context() as patch:
            patch.setattr(weights, "BLOCK_BYTES", 8000)  # several blocks to a tensor
            engine = load(tmp_path / "stored", dtype)
        assert_same(engine, whole)
        assert engine.memory.fingerprint == whole.memory.fingerprint


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("adapters", [1, 2], ids=["one-adapter", "two-adapters"])
def test_adapters_equal_the_formula(tmp_path, targets, adapters):
    """y = W x + (alpha / r) B A x, with `decoder_adapter` reading and `default` writing; one adapter does both."""
    lora = LORA | {"target_modules": targets}
    tensors = make(tmp_path, tiny.MEMORYLLM | {"lora_config": lora, "add_decoder_lora": adapters == 2})

    def formula(module, adapter, x):
        if module.rsplit(".", 1)[1] not in targets:
            return x @ tensors[f"{module}.weight"].double().T
        A, B = (tensors[f"{module}.lora_{letter}.{adapter}.weight"].double() for letter in "AB")
        return x @ tensors[f"{module}.base_layer.weight"].double().T + 12 / 4 * (x @ A.T @ B.T)

    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        for i, layer in enumerate(load(tmp_path, dtype).model.layers):
            for name, projections in FUSED.items():
                linear, part = getattr(layer, name), "self_attn" if name in ("qkv", "o") else "mlp"
                x = torch.randn(5, linear.weight.shape[1], dtype=dtype)
                reader = "decoder_adapter" if adapters == 2 else "default"
                for adapter, apply in ((reader, linear.read), ("default", linear.write)):
                    modules = [f"model.layers.{i}.{part}.{projection}" for projection in projections]
                    want = torch.cat([formula(module, adapter, x.double()) for module in modules], dim=-1)
                    assert relative_error(apply(x, reference), want) < tolerance


Q, NORM = "model.layers.1.self_attn.q_proj.base_layer.weight", "model.layers.2.input_layernorm.weight"
BIAS, FREQUENCY = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"
SPARE, MERGED = (Q.replace("base_layer", part) for part in ("lora_B.default", "lora_A.decoder_adapter"))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FREQUENCIES, FINITE = 500000.0 ** -(torch.arange(8) / 8), "expected finite numbers within torch.float16"
REFUSED = {  # config, tensor, its new value (see `make`), message; None: accepted, being redundant but right
    "missing": (MEMORYLLM, NORM, None, f"is missing: {NORM}"),
    "lost-adapter": (MEMORYLLM, "decoder_adapter", None, "is missing: model.layers.0.mlp.gate_proj.lora_A.decoder"),
    "extra": (LLAMA, BIAS, torch.zeros(64), f"is not used: {BIAS}"),
    "prefix-of-training": (MEMORYLLM, "base_model." + NORM, torch.ones(64), f"is not used: base_model.{NORM}"),
    "shape": (MEMORYLLM, SPARE, torch.zeros(4, 64), f"{SPARE}: expected [64, 4]"),
    "int8": (MEMORYLLM, Q, torch.zeros(64, 64, dtype=torch.int8), f"{Q}: expected [64, 64] in one of"),
    "nan": (MEMORYLLM, Q, torch.nan, f"{Q}: {FINITE}"),
    "nan-in-memory": (MEMORYLLM, "memory", torch.nan, f"memory: {FINITE}"),
    "inf-in-adapter": (MEMORYLLM, SPARE, -torch.inf, f"{SPARE}: {FINITE}"),
    "too-large": (MEMORYLLM, NORM, 65536.0, f"{NORM}: {FINITE}"),
    "too-large-when-merged": (MEMORYLLM, MERGED, torch.full((4, 64), 65000.0), f"{Q}: {FINITE}"),
    "too-large-when-scaled": (MEMORYLLM, SPARE, 60000.0, f"{SPARE}: {FINITE}"),  # what writers add: (alpha / r) B
    "head-off-by-half-a-percent": (TIED, HEAD, lambda embedding: embedding * 1.005, f"{HEAD}: contradicts"),
    "longer-head": (TIED, HEAD, lambda embedding: embedding.repeat(2, 1), f"{HEAD}: "),
    "same-head-rounded": (TIED, HEAD, torch.Tensor.bfloat16, None),
    "other-theta": (LLAMA, FREQUENCY, FREQUENCIES.square(), f"{FREQUENCY}: contradicts"),
    "fewer-frequencies": (LLAMA, FREQUENCY, FREQUENCIES[:4].clone(), f"{FREQUENCY}: "),
    "same-frequencies-rounded": (LLAMA, FREQUENCY, FREQUENCIES.half(), None),
}


@pytest.mark.parametrize(("config", "name", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(tmp_path, monkeypatch, config, name, value, message):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 8000)
    make(tmp_path, config)
    right = load(tmp_path, torch.float16)  # it is the change that is refused
    make(tmp_path, config, name, value)
    if message is None:
        return assert_same(load(tmp_path, torch.float16), right)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, torch.float16)


WHOLE, MAP = "expected a whole safetensors file", f"{INDEX}: expected JSON with a weight_map"
BROKEN = {  # file, None: removed, another name: moved there, a function of its bytes; message
    "no-config": ("config.json", None, "config.json: expected"),
    "bin-only": (SINGLE, "pytorch_model.bin", f"expected {SINGLE} or {INDEX}, found neither"),
    "truncated": (SINGLE, lambda old: old[:-1], f"{SINGLE}: {WHOLE}"),
    "missing-shard": (FIRST, None, f"{FIRST}: {WHOLE}"),
    "tensor-twice": (FIRST, lambda old: save({"initialized": torch.ones(1)}), f"'initialized' is also in {FIRST}"),
    "index-of-another-tensor": (INDEX, lambda old: old.replace(NORM.encode(), b"x"), f"tensor {NORM!r} is in the"),
    "index-of-another-shard": (INDEX, lambda old: old.replace(b'y": "model-00001', b'y": "model-00002'), "'memory'"),
    "index-of-a-list": (INDEX, lambda old: b'{"weight_map": ["memory"]}', MAP),
    "index-of-numbers": (INDEX, lambda old: b'{"weight_map": {"memory": 1}}', MAP),
}


@pytest.mark.parametrize(("file", "change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folder_is_refused_by_name(tmp_path, file, change, message):
    make(tmp_path)
    if file in (FIRST, INDEX):
        shard(tmp_path)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes())) if callable(change) else path.rename(tmp_path / (change or "gone"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path)


def test_fingerprint_is_of_the_weights(tmp_path):
    """Of every column of every tensor, but not of the pool, which is the memory's and not the model's."""

    def fingerprint(name=None, value=None, dtype=torch.float32):
        make(tmp_path, MEMORYLLM | {"vocab_size": 4096}, name, value)
        return load(tmp_path, dtype).memory.fingerprint

    want = fingerprint()
    assert {fingerprint(dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)} == {want}
    for name, tensor in load_file(tmp_path / SINGLE).items():
        if tensor.ndim and ("layers." not in name or "layers.1." in name):
            assert (fingerprint(name, tensor * 1.01) == want) == (name == "memory"), name
    assert fingerprint(EMBEDDING, lambda embedding: torch.cat([embedding[:, :1], embedding[:, 1:].flip(1)], 1)) != want


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# Growth from VmRSS to VmHWM, not of ru_maxrss: a process inherits that from the one that started it.
PROGRAM = """
import sys, memkernel
def status(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
for name, revision in (argument.split("@") for argument in sys.argv[1:]):
    before = status("VmRSS")
    try:
        engine = memkernel.Engine.from_pretrained(name, device="cpu", dtype="bfloat16", revision=revision or None)
        print(engine._memory and engine._memory.fingerprint)
    except ValueError as error:
        print(str(error).split(":")[0])
print(status("VmHWM") - before)
"""


def load_apart(*names, **environment):
    """Load each `name@revision` in a new process: their fingerprints or errors, then the peak bytes of the last."""
    command, root = [sys.executable, "-c", PROGRAM, *names], os.path.dirname(os.path.dirname(tiny.__file__))
    return subprocess.check_output(command, cwd=root, env=os.environ | environment, text=True).split()


LARGE = {"hidden_size": 1024, "intermediate_size": 2048, "num_key_value_heads": 1, "vocab_size": 32000}
PEAKS = {"llama": [LLAMA | LARGE], "tied-with-head": [TIED | LARGE, HEAD, torch.clone]}
PEAKS["memoryllm"] = [MEMORYLLM | LARGE | {"vocab_size": 8000, "num_blocks": 400}]


@LINUX
@pytest.mark.parametrize("large", PEAKS.values(), ids=PEAKS)
def test_peak_memory(tmp_path, large):
    """At most the model in bfloat16 and 100 MB, beyond what a tiny model left behind: no whole tensor in float32."""
    make(tmp_path / "tiny")
    sizes = {name: x.numel() for name, x in make(tmp_path / "large", *large).items() if name not in large}
    returned = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed memory goes back at once: the peak is the program's own
    *_, peak = load_apart(f"{tmp_path}/tiny@", f"{tmp_path}/large@", **returned)
    assert int(peak) <= 2 * sum(sizes.values()) + 100e6


@LINUX
def test_hub_offline(tmp_path):
    repository, commit = tmp_path / "models--org--name", "0123456789" * 4
    make(repository / "snapshots" / commit)
    fingerprint = load(repository / "snapshots" / commit).memory.fingerprint
    (repository / "refs").mkdir(), (repository / "refs" / "main").write_text(commit)
    names = ("nobody/nothing@", "org/name@", "org/name@main", f"org/name@{commit}", f"{tmp_path}@main")
    found = load_apart(*names, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert found[:-1] == ["nobody/nothing", *3 * [fingerprint], "revision"]
