"""The public engine against the numbers of the published implementation (float32, CPU), and against its data flow.

`golden/` holds four tiny checkpoints and what the published implementation computed from them. The oracle in
`benchmarks/published.py` is held to the same numbers, and then stands for geometries that `golden/` does not have.
"""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memkernel
from benchmarks.published import Published
from memkernel import tiny
from tests.compare import relative_error

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 2e-5

LORA = {"r": 4, "lora_alpha": 16, "inference_mode": True, "target_modules": ["q_proj", "v_proj", "k_proj", "up_proj"]}
ALL_PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
VARIANTS = {  # changes to tiny.MEMORYLLM, lengths of the updates
    "no-bos": ({"add_bos_embedding": False}, [40, 9, 40]),
    "one-adapter": ({"lora_config": LORA}, [40, 40, 12]),
    "two-adapters-everywhere": (
        {"lora_config": LORA | {"target_modules": ALL_PROJECTIONS}, "add_decoder_lora": True},
        [40, 5, 64],
    ),
    "linear-rope-2048-rows": ({"rope_scaling": {"type": "linear", "factor": 1.8125}, "num_blocks": 128}, [200, 60]),
    "head-size-128": ({"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}, [40, 40]),
    "one-token": ({}, [40, 1, 2, 15, 16, 17]),
    "several-times-the-pool": ({"num_blocks": 4}, [300, 200, 500]),
    "first-update-divides-the-pool": ({"num_blocks": 7}, [7, 40]),
    "first-update-ragged": ({"num_blocks": 7}, [9, 40, 5]),
    "one-block": ({"num_blocks": 1}, [40, 40, 5]),
    "shared-drop": ({"drop_memory_per_layer": False, "num_key_value_heads": 4}, [48, 32, 3]),
}


@pytest.fixture
def load():
    def load(folder, **kwargs):
        warnings.filterwarnings("ignore", "text of")  # short updates are meant here
        return memkernel.Engine.from_pretrained(folder, device="cpu", dtype=torch.float32, keep_hidden=True, **kwargs)

    with warnings.catch_warnings():
        yield load


def queries_of(trace):
    return [q for q in range(9) if f"query{q}.input_ids" in trace]


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_published_numbers(load, case):
    trace, errors = load_file(GOLDEN / case / "trace.safetensors"), []
    engine, queries, u = load(GOLDEN / case), queries_of(trace), 0

    def check(got, name):
        errors.append(relative_error(got, trace[name]))
        assert errors[-1] < TOLERANCE, name

    for q in queries:
        check(engine.logits(trace[f"query{q}.input_ids"]), f"query{q}.logits_before_any_update")
    while (update := f"update{u}") + ".input_ids" in trace:
        delta = engine.model.inject(trace[f"{update}.input_ids"][0], engine.memory)
        check(delta.hidden, f"{update}.delta_memory")
        engine.update(trace[f"{update}.input_ids"], dropped=trace.get(f"{update}.dropped"), chunk_tokens=None)
        check(engine.memory.hidden(), f"{update}.memory_after")
        for q in queries:
            check(engine.logits(trace[f"query{q}.input_ids"]), f"{update}.query{q}.logits")
        u += 1
    assert u == engine.memory.step
    print(f"{case}: largest relative error {max(errors):.1e} of {len(errors)} comparisons")
    for q in queries:
        prompt = trace[f"query{q}.input_ids"]
        answer = engine.generate(prompt, max_new_tokens=8, min_tokens=8, temperature=0)
        assert answer.token_ids == trace[f"query{q}.greedy"][0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_oracle_equals_published_numbers(case):
    trace = load_file(GOLDEN / case / "trace.safetensors")
    oracle, u = Published.load(GOLDEN / case), 0
    for q in queries_of(trace):
        got = oracle.logits(trace[f"query{q}.input_ids"])
        assert relative_error(got, trace[f"query{q}.logits_before_any_update"]) < TOLERANCE
    while (update := f"update{u}") + ".input_ids" in trace:
        delta = oracle.update(trace[f"{update}.input_ids"][0], trace.get(f"{update}.dropped"))
        assert relative_error(delta, trace[f"{update}.delta_memory"]) < TOLERANCE
        assert relative_error(oracle.memory, trace[f"{update}.memory_after"]) < TOLERANCE
        for q in queries_of(trace):
            got = oracle.logits(trace[f"query{q}.input_ids"])
            assert relative_error(got, trace[f"{update}.query{q}.logits"]) < TOLERANCE
        u += 1
    assert u > 0
    for q in queries_of(trace):
        T, answer = trace[f"query{q}.input_ids"].shape[1], trace[f"query{q}.greedy"]
        (logits, cache), steps = oracle.prefill(answer[:, :T]), []
        for t in range(T, answer.shape[1]):
            logits[..., oracle.config["eos_token_id"]] = -torch.inf
            assert logits[0, -1].argmax() == answer[0, t]
            logits, cache = oracle.decode(answer[:, t : t + 1], cache)
            steps.append(logits.clone())
        assert relative_error(torch.cat(steps, dim=1), oracle.logits(answer)[:, T:]) < TOLERANCE


def test_oracle_shares_the_tensors(tmp_path):
    tiny.write_checkpoint(tmp_path, initialized=True)
    tensors = load_file(tmp_path / "model.safetensors")
    oracle = Published(tiny.MEMORYLLM, tensors)
    with torch.no_grad():
        oracle.update(torch.arange(40))
    state = oracle.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shipped", [False, True], ids=["empty", "shipped-memory"])
def test_engine_equals_published_data_flow(load, tmp_path, name, shipped):
    """Same `torch.randperm` draws, so that the pools agree row by row; a batch of prompts read at once."""
    changes, lengths = VARIANTS[name]
    tiny.write_checkpoint(tmp_path, tiny.MEMORYLLM | changes, initialized=shipped)
    engine, oracle = load(tmp_path, draw="published"), Published.load(tmp_path)
    prompts = torch.randint(256, (3, 21))
    for length in lengths:
        ids = torch.randint(256, (length,))
        seed = torch.randint(1 << 30, ()).item()
        torch.manual_seed(seed)
        oracle.update(ids)
        torch.manual_seed(seed)
        engine.update(ids, chunk_tokens=None)
        assert relative_error(engine.memory.hidden(), oracle.memory) < TOLERANCE
        assert relative_error(engine.logits(prompts), oracle.logits(prompts)) < TOLERANCE
        assert relative_error(engine.logits(prompts[:1, :1]), oracle.logits(prompts[:1, :1])) < TOLERANCE
    step, _ = oracle.decode(prompts[:, 20:], oracle.prefill(prompts[:, :20])[1])
    assert relative_error(step[:, 0], engine.logits(prompts)[:, -1]) < TOLERANCE


def test_decode_equals_published_data_flow(load, tmp_path):
    tiny.write_checkpoint(tmp_path, initialized=True)
    engine, oracle = load(tmp_path), Published.load(tmp_path)
    prompt = torch.randint(256, (1, 12))
    for _ in range(2):
        got = engine.generate(prompt, max_new_tokens=16, temperature=0, ignore_eos=True).token_ids
        ids = prompt
        for _ in range(16):
            ids = torch.cat([ids, oracle.logits(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert got == ids[0, 12:].tolist()
        text = torch.randint(256, (50,))
        torch.manual_seed(1)
        oracle.update(text)
        torch.manual_seed(1)
        dropped = torch.stack([torch.randperm(128)[112:] for _ in range(3)])
        engine.update(text, dropped=dropped)


def test_one_wrong_row_is_noticed(load):
    """The comparison can fail: another row dropped in one layer is an error far above the tolerance."""
    trace = load_file(GOLDEN / "gqa_drop_per_layer" / "trace.safetensors")
    engine = load(GOLDEN / "gqa_drop_per_layer")
    engine.update(trace["update0.input_ids"], chunk_tokens=None)
    dropped = trace["update1.dropped"].clone()
    dropped[1, 0] = next(rank for rank in range(128) if rank not in dropped[1])
    engine.update(trace["update1.input_ids"], dropped=dropped, chunk_tokens=None)
    assert relative_error(engine.logits(trace["query0.input_ids"]), trace["update1.query0.logits"]) > 10 * TOLERANCE
