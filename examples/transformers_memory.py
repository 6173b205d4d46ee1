"""Hugging Face transformers reading a MemoryLLM memory: its Llama, our memory as its attention implementation.

    python examples/transformers_memory.py [checkpoint folder]

The memory is written by memkernel. transformers' own modules then answer a prompt with the checkpoint's read weights:
the registered attention function adds the memory's rows to those of transformers' cache, in one op that reads the
memory where it lies, and no mask is made. The tokens must be those of memkernel's own engine.
"""

import sys
import tempfile

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

import memkernel
from memkernel import tiny
from memkernel.ops import memory_attention

NAME = "memkernel_memory"
GEOMETRY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_blocks": 16, "num_tokens": 32}
TEXT = "David said that he likes apples, and that his sister in Lyon likes pears."
QUESTION = "What does David like? He likes"


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, **kwargs):
    """transformers' signature: query [B, H, T, D], key and value [B, G, S, D] of its cache, all of it seen up to the
    diagonal. Heads come second there and third here: the Triton kernels take such strides, the CPU kernel copies the
    cache's rows, not the memory's."""
    own_key, own_value = key.transpose(1, 2), value.transpose(1, 2)
    memory, i, (B, _, T, _) = module.memory, module.layer_idx, query.shape
    start = torch.full((B,), key.shape[2] - T, dtype=torch.int32, device=query.device)
    rows = memory.rotated_key[i, None], memory.value[i, None]
    out = memory_attention(query.transpose(1, 2), *rows, own_key, own_value, start)
    return out, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the op knows who sees what


def transformers_llama(engine: memkernel.Engine) -> LlamaForCausalLM:
    """transformers' Llama over the engine's weights, read adapter merged, sharing their storage."""
    config, rope = engine.config, engine.config.rope
    scaling = {"rope_type": "default"} if rope.kind == "default" else {"rope_type": rope.kind, "factor": rope.factor}
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters=scaling | {"rope_theta": rope.theta},
        max_position_embeddings=1 << 17,
        attn_implementation=NAME,
        dtype=engine.model.embedding.dtype,
    )
    model = LlamaForCausalLM(llama).to(engine.model.embedding.device).eval()
    model.load_state_dict(state_dict(engine.model), strict=True, assign=True)
    for layer in model.model.layers:
        layer.self_attn.memory = engine.memory
    return model


def state_dict(model) -> dict[str, Tensor]:
    config, state = model.config, {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    state["lm_head.weight"] = model.head
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    for i, layer in enumerate(model.layers):
        parts = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        parts |= dict(zip(names, layer.qkv.weight.split([queries, keys, keys]), strict=True))
        parts |= dict(zip(("mlp.gate_proj", "mlp.up_proj"), layer.gate_up.weight.chunk(2), strict=True))
        parts |= {"self_attn.o_proj": layer.o.weight, "mlp.down_proj": layer.down.weight}
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    return state


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, engine: memkernel.Engine, prompt: list[int], count: int) -> list[int]:
    """`count` tokens by transformers. Its cache begins with bos, where the model has one; the memory stands between it
    and the text, so that the text's positions begin at 1 + M."""
    ours, memory = engine.model, engine.memory
    cache, device = DynamicCache(), ours.embedding.device
    ours.new_cache(1, 1, memory)  # brings the memory's rotated keys up to date
    if engine.config.has_bos:
        for i in range(engine.config.num_layers):
            cache.update(ours.bos_key[i, None, :, None], ours.bos_value[i, None, :, None], i)
    tokens, fed = [], torch.tensor([prompt], device=device)
    for _ in range(count):
        first = engine.config.memory_rows + cache.get_seq_length()
        position = torch.arange(first, first + fed.shape[1], device=device)[None]
        logits = model(fed, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        fed = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(fed.item())
    return tokens


def main(folder: str | None = None, count: int = 24) -> tuple[list[int], list[int]]:
    """Returns memkernel's tokens and transformers'."""
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            tiny.write_tokenizer(tiny.write_checkpoint(made, tiny.MEMORYLLM | GEOMETRY, seed=4))
        engine = memkernel.Engine.from_pretrained(folder or made, dtype="float32")
        for _ in range(2):
            engine.update(TEXT)
        ours = engine.generate(QUESTION, max_tokens=count, ignore_eos=True).token_ids
        prompt = engine.tokenizer(QUESTION, add_special_tokens=False).input_ids
        theirs = greedy(transformers_llama(engine), engine, prompt, count)
    print(f"memory       {engine.config.memory_rows} rows in each of {engine.config.num_layers} layers, 2 updates")
    print(f"memkernel    {ours}\ntransformers {theirs}")
    print("equal" if ours == theirs else "NOT EQUAL")
    return ours, theirs


if __name__ == "__main__":
    ours, theirs = main(*sys.argv[1:2])
    sys.exit(ours != theirs)
