"""The forward without a memory against transformers' Llama: tiny random models that transformers itself wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from memkernel import Engine
from tests.compare import assert_no_worse, relative_error

TOLERANCE = 5e-6
BASE = {
    "vocab_size": 193,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # attention far from uniform, logits far from equal
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEOMETRIES = {
    "gqa": {"rope_theta": 500000.0},
    "mha-linear": {"num_key_value_heads": 4, "rope_scaling": {"rope_type": "linear", "factor": 1.8125}},
    "mqa-llama3": {"num_key_value_heads": 1, "rope_scaling": STRETCHED, "rope_theta": 500000.0},
    "tied-eps-1e-6": {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "head-size-24": {"head_dim": 24, "rms_norm_eps": 1e-2},  # H D = 96, E = 64
    "head-size-128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},  # H D = 256
    "odd-sizes": {
        "vocab_size": 101,
        "hidden_size": 54,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
LENGTHS = {"1-token": (1, 1), "70-tokens": (1, 70), "batch": (3, 70)}


@dataclass
class Case:
    config: LlamaConfig
    folder: Path

    def theirs(self, dtype: torch.dtype = torch.float32, attention: str = "eager") -> LlamaForCausalLM:
        """Loaded, not cast: a cast would round the frequencies of the rotation too."""
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation=attention).eval()

    def ours(self, dtype: torch.dtype = torch.float32) -> Engine:
        return Engine.from_pretrained(self.folder, device="cpu", dtype=dtype)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(self.config.vocab_size, shape)


@pytest.fixture(scope="module", params=GEOMETRIES)
def case(request, tmp_path_factory):
    torch.manual_seed(1)
    config = LlamaConfig(**BASE | GEOMETRIES[request.param])
    model, folder = LlamaForCausalLM(config), tmp_path_factory.mktemp(request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-1.5, 1.5)  # ones would hide a norm's weight that is left out
    model.save_pretrained(folder)
    return Case(config, folder)


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def exact(monkeypatch, model: LlamaForCausalLM, rope=None) -> LlamaForCausalLM:
    """`model` in float64 throughout: transformers computes its norms in float32 whatever the dtype.

    The rotation's table is float32 there as here. With `rope`, it is the engine's.
    """

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def rotations(self, x, position_ids):
        table = rope.table(int(position_ids.max()) + 1, model.config.head_dim, torch.device("cpu"))
        return tuple(torch.cat([half, half], dim=-1)[position_ids].to(x.dtype) for half in table)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    if rope is not None:
        monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotations)
    return model.double()


@pytest.mark.parametrize("shape", LENGTHS.values(), ids=LENGTHS)
def test_logits_equal_transformers(case, shape):
    ids = case.ids(*shape)
    assert relative_error(case.ours().logits(ids), logits_of(case.theirs(), ids)) < TOLERANCE


def test_decoding_equals_transformers(case):
    """The cache: logits of each greedy step, and the tokens."""
    engine, model, new = case.ours(), case.theirs(), 24
    for length in (1, 40):
        prompt = case.ids(1, length)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        want = out.sequences[0, length:].tolist()
        answer = engine.generate(prompt, max_new_tokens=new, temperature=0, ignore_eos=True)
        assert answer.token_ids == want and len(want) == new and len(set(want)) > 1
        likelihoods = torch.cat(out.logits).log_softmax(-1).gather(1, torch.tensor(want)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), likelihoods, rtol=0, atol=2e-5)


def test_batch_equals_one_at_a_time(case):
    engine = case.ours()
    prompts = [case.ids(length).tolist() for length in (33, 1, 70, 2)]
    together = engine.generate(prompts, max_new_tokens=16, temperature=0, ignore_eos=True)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = engine.generate(prompt, max_new_tokens=16, temperature=0, ignore_eos=True)
        assert answer.token_ids == alone.token_ids and len(alone.token_ids) == 16
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(alone.logprobs), rtol=0, atol=2e-5)


def test_float64_equals_float64(case, monkeypatch):
    """float64 logits, from the same float32 table of rotations: the two round the angles of scaled RoPE differently."""
    ids, engine = case.ids(2, 70), case.ours(torch.float64)
    same_table = engine.config.rope.kind == "default"
    model = exact(monkeypatch, case.theirs(torch.float64, "sdpa"), None if same_table else engine.config.rope)
    hidden = engine._prefill(list(ids))
    got = torch.nn.functional.linear(hidden, engine.model.head)  # `logits` rounds to float32
    assert got.dtype == torch.float64 and relative_error(got, logits_of(model, ids)) < 1e-12
    assert torch.equal(engine.logits(ids), got.float())


def test_bfloat16_is_no_worse(case, monkeypatch):
    """Against float64 with the weights already rounded to bfloat16, so that only the arithmetic is compared."""
    ids, model = case.ids(2, 70), case.theirs(torch.bfloat16, "sdpa")
    plain = logits_of(model, ids).float()
    want = logits_of(exact(monkeypatch, model), ids)
    assert_no_worse("logits", case.ours(torch.bfloat16).logits(ids), want, plain)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "factor", "low_freq_factor"])
def test_one_wrong_key_is_noticed(tmp_path, key):
    """The comparison can fail: a key misread by a few percent is an error far above the tolerance."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**BASE | GEOMETRIES["mqa-llama3"])).eval()
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (raw if key in raw else raw["rope_parameters"])[key] *= 1.05
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = torch.randint(193, (1, 70))
    assert relative_error(Case(model.config, tmp_path).ours().logits(ids), logits_of(model, ids)) > 4 * TOLERANCE
