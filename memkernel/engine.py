"""The engine: text in, text out, and a memory that each update rewrites a part of."""

import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from memkernel import ops as registered_ops
from memkernel import weights
from memkernel.config import Keys
from memkernel.decoding import Decoders, prefill
from memkernel.devices import choose
from memkernel.graphs import Graphs
from memkernel.memory import Memory
from memkernel.model import Llama
from memkernel.request import Completion, Request
from memkernel.sampling import SamplingParams
from memkernel.updating import Updater

CHUNK_TOKENS = 512  # the longest text that one update was trained on
MIN_TOKENS = 16  # the shortest; fewer disturb the memory
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Update:
    """What `Engine.update` did. version: the memory's updates so far, this one included."""

    chunks: int
    tokens: int
    seconds: float
    version: int


class Engine:
    """A model, its memory and its tokenizer. Not thread-safe: one call at a time.

    A prompt is a string, token ids (a list, or a tensor or array of shape [T] or [1, T]), or a list of chat messages
    ({"role": ..., "content": ...}) to be put through the tokenizer's chat template. Several prompts are a list of
    these, or ids of shape [B, T]. Wrong arguments raise ValueError and change nothing.
    """

    def __init__(self, model: Llama, memory: Memory | None, folder: Path):
        self.model, self.config, self.folder = model, model.config, folder
        self._memory = memory
        self._graphs = Graphs(model.embedding.device, model.ops)
        self._decoders, self._updater = Decoders(model, self._graphs), Updater(model, self._graphs)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        keep_hidden: bool = False,
        seed: int = 0,
        draw: str = "counter",
        ops=registered_ops,
    ) -> "Engine":
        """Load a checkpoint: MemoryLLM, or a plain Llama (which generates, but has no memory to update).

        Args:
            name: a folder, or a hub id (with `revision`); HF_HUB_OFFLINE and HF_TOKEN are obeyed.
            device: "auto" is CUDA where there is one.
            dtype: "auto" is bfloat16 where the device multiplies it natively, else float32.
            keep_hidden: also keep the memory as hidden states, for `memory.hidden()` and `save_pretrained`.
            seed, draw: of the random drop, see `Memory`.
            ops: the namespace of ops to run on, `memkernel.ops` or `memkernel.reference`.
        Raises: ValueError naming the config key, tensor, file or argument that is wrong.
        """
        device, dtype, chosen = choose(device, dtype)
        if chosen:
            print(f"memkernel: {chosen}", file=sys.stderr)
        folder = weights.find_folder(name, revision)
        model, memory = weights.load(folder, dtype, device, ops, keep_hidden, seed, draw)
        return cls(model, memory, folder)

    @property
    def memory(self) -> Memory:
        """The memory that is read and updated. Assigning another memory of this model (a fork, say) switches to it.

        Several may be resident; each keeps the graphs that were captured for it, as long as it lives. One that lives on
        another device is brought in by `memory.to(...)`.
        """
        if self._memory is None:
            raise ValueError(f"memory: {self.folder} is a plain Llama (its config.json has no num_blocks), it has none")
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        mine = self.memory
        if not isinstance(memory, Memory) or memory.fingerprint != mine.fingerprint:
            raise ValueError(f"memory: expected a Memory of this model, got {type(memory).__name__} of another")
        if memory.key.dtype != mine.key.dtype:
            raise ValueError(f"memory: expected {mine.key.dtype}, got {memory.key.dtype}")
        if memory.key.device != mine.key.device:
            here, there = str(mine.key.device), memory.key.device
            raise ValueError(f"memory: expected one on {here}, got one on {there}; memory.to({here!r}) is a copy here")
        self._memory = memory

    @cached_property
    def tokenizer(self):
        """The folder's Hugging Face tokenizer, or None if it has none."""
        if not any((self.folder / file).is_file() for file in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"{self.folder}: its tokenizer cannot be loaded: {error}") from error

    # -- writing ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update(self, text, *, dropped: Tensor | None = None, chunk_tokens: int | None = CHUNK_TOKENS) -> Update:
        """Write text into the memory, chunk by chunk, each chunk dropping `write_rows` random rows of every layer.

        Each chunk is taken in whole or, if an error or Ctrl-C stops it, not at all; chunks before it stay.

        Args:
            text: a string, token ids, or several of either.
            dropped: [L, W] integers, the ranks (0 is the oldest row) to drop instead of drawing; for one chunk.
            chunk_tokens: longest chunk, at least 16; None makes one chunk of each text.
        """
        memory = self.memory
        if chunk_tokens is not None and (type(chunk_tokens) is not int or chunk_tokens < MIN_TOKENS):
            raise ValueError(
                f"chunk_tokens: expected an integer of at least {MIN_TOKENS}, or None, got {chunk_tokens!r}"
            )
        texts, _ = self._prompts("text", text)
        device = self.model.embedding.device
        chunks = [chunk for ids in texts for chunk in split_chunks(ids.to(device), chunk_tokens)]
        if (shortest := min(map(len, chunks))) < MIN_TOKENS:
            warnings.warn(f"text of {shortest} tokens: fewer than {MIN_TOKENS} disturb the memory", stacklevel=3)
        if dropped is not None and len(chunks) != 1:
            raise ValueError(f"dropped: expected text of one chunk, got {len(chunks)} chunks")
        began = time.perf_counter()
        for ids in tqdm(chunks, desc="updating", unit="chunk", leave=False, disable=True if len(chunks) < 8 else None):
            self._updater.write(ids, memory, dropped)
        return Update(len(chunks), sum(map(len, chunks)), time.perf_counter() - began, memory.step)

    # -- reading ------------------------------------------------------------------------------------------------------

    def generate(self, prompt, **sampling) -> Completion | list[Completion]:
        """Continue a prompt, or several in one batch; keyword arguments are those of `SamplingParams`.

        Several prompts may differ in length; each gives the tokens that it would give alone, up to rounding: matrix
        products add in another order when the batch, the number of threads or the device is another, so that where two
        tokens are nearly as likely even the greedy choice may differ. The same call on the same machine repeats bit for
        bit, sampled with a seed or greedy.
        """
        requests, many = self._requests(prompt, sampling)
        for _ in self._run(requests):
            pass
        completions = [request.completion() for request in requests]
        return completions if many else completions[0]

    def chat(self, messages: list[dict[str, str]], **sampling) -> Completion:
        """Answer a conversation through the tokenizer's chat template."""
        if not _is_messages(messages):
            raise ValueError(f"messages: expected a list of {{'role': ..., 'content': ...}}, got {messages!r}")
        return self.generate(messages, **sampling)

    def stream(self, prompt, **sampling) -> Iterator[str]:
        """Continue one prompt piece by piece: whole characters, no part of a stop string. Joined, they are the text of
        `generate`. The memory must not change meanwhile."""
        requests, many = self._requests(prompt, sampling)
        if many:
            raise ValueError(f"prompt: expected one prompt to stream, got {len(requests)}")
        if requests[0].text is None:
            raise ValueError(f"prompt: streaming text needs a tokenizer, and {self.folder} has none")
        return self._pieces(requests[0])

    @torch.no_grad()  # not inference_mode: what is returned is the caller's to change
    def logits(self, input_ids) -> Tensor:
        """Next-token logits after each token: [B, T, V] float32, on the model's device. The memory is only read.

        Args: input_ids: ids of shape [T], [1, T] or [B, T], or text; several must be of one length.
        """
        prompts, _ = self._prompts("input_ids", input_ids)
        if len({len(ids) for ids in prompts}) > 1:
            raise ValueError(f"input_ids: expected sequences of one length, got {[len(ids) for ids in prompts]}")
        return self.model.logits(self._prefill(prompts))

    @torch.inference_mode()
    def score(self, prompt, completion) -> list[float]:
        """The log-probability of each token of `completion` after `prompt`: text or token ids, tokenized apart."""
        (befores, _), (afters, _) = self._prompts("prompt", prompt), self._prompts("completion", completion, bos=False)
        if len(befores) + len(afters) > 2:
            raise ValueError(f"prompt: expected one prompt and one completion, got {len(befores)} and {len(afters)}")
        before, after = befores[0], afters[0]
        hidden = self._prefill([torch.cat([before, after])[:-1]])
        log_probabilities = self.model.logits(hidden[0, len(before) - 1 :]).log_softmax(-1)
        return log_probabilities.gather(1, after.to(hidden.device)[:, None])[:, 0].tolist()

    def _prefill(self, prompts: list[Tensor]) -> Tensor:
        """Read prompts of any lengths, to be continued by nobody; returns hidden [B, longest, E]."""
        memory = self._readable_memory
        cache = self.model.new_cache(len(prompts), max(map(len, prompts)), memory)
        return prefill(self.model, prompts, cache, memory)[0]

    @property
    def _readable_memory(self) -> Memory | None:
        return self._memory if self._memory is not None and self._memory.initialized else None

    @torch.inference_mode()
    def _run(self, requests: list[Request]) -> Iterator[None]:
        """Decode until every request is done, yielding after each step."""
        memory = self._readable_memory
        edits = memory and memory.edits
        for _ in self._decoders.run(requests, memory):
            yield
            going_on = not all(request.finish_reason for request in requests)
            if going_on and memory is not None and (memory.edits != edits or self._memory is not memory):
                raise RuntimeError("memory: expected no change while a prompt is being answered, got one")

    def _pieces(self, request: Request) -> Iterator[str]:
        sent = 0
        for _ in self._run([request]):
            if piece := request.text.released[sent:]:
                sent += len(piece)
                yield piece

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _requests(self, prompt, sampling: dict) -> tuple[list[Request], bool]:
        params = SamplingParams.from_kwargs(**sampling)
        prompts, many = self._prompts("prompt", prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop: stop strings need a tokenizer, and {self.folder} has none")
        if wrong := [token for token in params.stop_token_ids if token >= self.config.vocab_size]:
            raise ValueError(f"stop_token_ids: expected ids below {self.config.vocab_size}, got {wrong[0]}")
        return [Request(ids, params, self.eos_token_ids, self.tokenizer) for ids in prompts], many

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: of config.json, generation_config.json, the tokenizer and its chat template."""
        found = set(self.config.eos_token_ids)
        generation = self.folder / "generation_config.json"
        if generation.is_file():
            try:
                found |= set(Keys(json.loads(generation.read_text())).token_ids("eos_token_id"))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{generation}: {error}") from None
        if self.tokenizer is not None:
            found.add(self.tokenizer.eos_token_id)
            if "<|eot_id|>" in (self.tokenizer.chat_template or ""):  # Llama 3 ends a turn with it, not with the eos
                found.add(self.tokenizer.get_vocab().get("<|eot_id|>"))
        return tuple(sorted(token for token in found if token is not None and 0 <= token < self.config.vocab_size))

    def _prompts(self, name: str, given, bos: bool = True) -> tuple[list[Tensor], bool]:
        """One or several prompts -> ([T] int64 CPU tensors, whether several were given).

        `bos`: text begins with the tokenizer's special tokens, unless the model has a memory, with bos rows of its own.
        """
        if isinstance(given, Tensor | np.ndarray) and given.ndim == 2:
            given = list(given) if len(given) > 1 else given.reshape(-1)
        if isinstance(given, list | tuple) and given and isinstance(given[0], str | list | tuple | Tensor | np.ndarray):
            inner = [self._prompts(f"{name}[{i}]", one, bos) for i, one in enumerate(given)]
            for i, (_, nested) in enumerate(inner):
                if nested:
                    raise ValueError(f"{name}[{i}]: expected one text or sequence of ids, got a list of several")
            return [prompts[0] for prompts, _ in inner], True
        if isinstance(given, str):
            return [self._encode(name, given, bos and not self.config.has_memory)], False
        return [self._encode_messages(given) if _is_messages(given) else self._ids(name, given)], False

    def _ids(self, name: str, given) -> Tensor:
        try:
            ids = torch.as_tensor(np.ascontiguousarray(given) if isinstance(given, np.ndarray) else given)
        except (TypeError, ValueError, RuntimeError):
            ids = None
        if ids is not None and ids.numel() == 0:
            raise ValueError(f"{name}: expected at least one token, got none")
        if (
            ids is None
            or ids.ndim != 1
            or ids.dtype.is_floating_point
            or ids.dtype.is_complex
            or ids.dtype == torch.bool
        ):
            got = f"{list(ids.shape)} {ids.dtype}" if ids is not None else repr(given)[:80]
            raise ValueError(f"{name}: expected text, or integer token ids of shape [T], got {got}")
        ids = ids.to("cpu", torch.int64)
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{name}: expected token ids in [0, {self.config.vocab_size}), got {ids.min()} to {ids.max()}"
            )
        return ids

    def _encode(self, name: str, text: str, special: bool) -> Tensor:
        if self.tokenizer is None:
            raise ValueError(f"{name}: text needs a tokenizer, and {self.folder} has none; pass token ids")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # a byte that was not UTF-8 where it came from
            raise ValueError(f"{name}: expected text that UTF-8 can hold, got {text!r}")
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        if not text or not ids:
            raise ValueError(f"{name}: expected text, got {text!r}")
        return self._ids(name, ids)

    def _encode_messages(self, messages: list[dict]) -> Tensor:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError(f"messages: they need a tokenizer with a chat template, and {self.folder} has none")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None
        ids = self._encode("messages", text, special=False)
        bos = self.config.has_memory and len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id
        return ids[1:] if bos else ids

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint in the published layout: the one this engine was loaded from, with the memory of now.

        Needs keep_hidden=True. The folder must be new or empty; it appears when it is whole.
        """
        folder, hidden = Path(folder), self.memory.hidden().cpu()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"folder: expected a new or empty folder, got {str(folder)!r}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = weights.Checkpoint(self.folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
            whole = Path(partial) / "whole"
            whole.mkdir()
            for file in source.files:
                tensors = {name: source.read(name) for name, home in source.file_of.items() if home == file}
                if "memory" in tensors:
                    tensors["memory"] = hidden.to(tensors["memory"].dtype)
                if "initialized" in tensors:
                    tensors["initialized"] = torch.tensor(int(self.memory.initialized), dtype=torch.uint8)
                save_file(tensors, whole / file, metadata={"format": "pt"})
            for pattern in weights.SMALL_FILES:
                for path in self.folder.glob(pattern):
                    shutil.copy2(path, whole)
            whole.replace(folder)


def _is_messages(value) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def split_chunks(ids: Tensor, chunk_tokens: int | None) -> list[Tensor]:
    """Cut [T] ids into chunks of `chunk_tokens`; if the last would be under 16 tokens, into chunks of even length."""
    if chunk_tokens is None or len(ids) <= chunk_tokens:
        return [ids]
    if 0 < len(ids) % chunk_tokens < MIN_TOKENS:
        return list(ids.tensor_split(-(-len(ids) // chunk_tokens)))
    return list(ids.split(chunk_tokens))
