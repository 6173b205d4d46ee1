"""Checkpoints: streaming safetensors into fused parameters, every tensor used or named in an error.

Names, shapes and dtypes are checked against the file headers before any data is read. Data moves one tensor at a time,
in blocks of rows, so that the peak is the model in its own dtype plus less than one tensor of a file.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from memkernel import huge_pages
from memkernel.config import ModelConfig
from memkernel.memory import Memory
from memkernel.model import Layer, Linear, Llama

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
FLOATS = ("F64", "F32", "F16", "BF16")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # config, index, tokenizer, chat template
BLOCK_BYTES = 8 << 20
PROJECTED_ROWS = 2048  # memory rows projected at a time while loading
# What a memory depends on beside the weights: a file of another value of these is of another model.
FINGERPRINTED = ("hidden_size", "num_heads", "num_kv_heads", "norm_eps", "rope", "memory_rows", "write_rows", "has_bos")
SAMPLES = 1024  # numbers of each tensor that enter the fingerprint, beside its least and greatest


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """`name` if it is a folder, else the snapshot of the hub repository of that id; HF_HUB_OFFLINE, HF_TOKEN obeyed."""
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"revision: expected None for a local folder, got {revision!r}")
        return Path(name)
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        patterns = ["*.safetensors", *SMALL_FILES]
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (hub.HFValidationError, hub.HfHubHTTPError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ValueError(f"{name}: expected a checkpoint folder or a hub id that can be fetched: {error}") from error


class Checkpoint:
    """The tensors of a folder by name: `model.safetensors`, or shards listed in `model.safetensors.index.json`."""

    def __init__(self, folder: str | Path):
        """Read the headers. Raises ValueError if a file is missing, truncated, or disagrees with the index."""
        self.folder = Path(folder)
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        listed = None
        if index.is_file():
            try:
                listed = json.loads(index.read_text())["weight_map"]
                if not all(isinstance(file, str) for file in listed.values()):
                    raise TypeError("a file name is not a string")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}: expected JSON with a weight_map: {error!r}") from None
        elif not single.is_file():
            raise ValueError(
                f"{self.folder}: expected model.safetensors or model.safetensors.index.json, found neither"
            )
        self.files = sorted(set(listed.values())) if listed is not None else [single.name]
        self.shapes, self.dtypes, self.file_of = {}, {}, {}
        for file in self.files:
            self._read_header(file)
        for name in sorted(set(listed or self.file_of) | set(self.file_of)):
            if listed is not None and listed.get(name) != self.file_of.get(name):
                places = f"the index in {listed.get(name)}, in the shards in {self.file_of.get(name)}"
                raise ValueError(f"{index}: tensor {name!r} is in {places}, expected one place")

    def _read_header(self, file: str) -> None:
        with self._open(file) as reader:
            for name in sorted(reader.keys()):
                if name in self.file_of:
                    raise ValueError(f"{file}: tensor {name!r} is also in {self.file_of[name]}")
                part = reader.get_slice(name)
                self.file_of[name] = file
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()

    def _open(self, file: str):
        try:
            return safetensors.safe_open(self.folder / file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file}: expected a whole safetensors file: {error}") from None

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The tensor's rows in order as (first row, rows [n, ...]); the file is mapped only while a block is read."""
        rows = self.shapes[name][0]
        step = max(1, BLOCK_BYTES * rows // max(1, self.bytes(name)))
        for begin in range(0, rows, step):
            yield begin, self.rows(name, begin, begin + step)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        with self._open(self.file_of[name]) as reader:
            return reader.get_slice(name)[begin:end]

    def read(self, name: str) -> Tensor:
        with self._open(self.file_of[name]) as reader:
            return reader.get_tensor(name)

    def bytes(self, name: str) -> int:
        return DTYPES[self.dtypes[name]].itemsize * torch.Size(self.shapes[name]).numel()


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this geometry holds."""
    E, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    attention = {"q_proj": (queries, E), "k_proj": (keys, E), "v_proj": (keys, E), "o_proj": (E, queries)}
    mlp = {"gate_proj": (F, E), "up_proj": (F, E), "down_proj": (E, F)}
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (V, E)
    for i in range(L):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (E,), layer + "post_attention_layernorm.weight": (E,)}
        for part, modules in (("self_attn.", attention), ("mlp.", mlp)):
            for module, (rows, columns) in modules.items():
                shapes |= _module_shapes(config, layer + part + module, rows, columns)
    if config.has_memory:
        shapes |= {"memory": (L, config.memory_rows, E), "new_memory_positional_emb": (1, 1, E), "initialized": ()}
        if config.has_bos:
            shapes["bos_embedding"] = (L, 1, E)
    return shapes


def _module_shapes(config: ModelConfig, module: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    if config.lora is None or module.rsplit(".", 1)[1] not in config.lora.targets:
        return {f"{module}.weight": (rows, columns)}
    shapes = {f"{module}.base_layer.weight": (rows, columns)}
    for adapter in ("default", "decoder_adapter") if config.read_adapter else ("default",):
        shapes[f"{module}.lora_A.{adapter}.weight"] = (config.lora.rank, columns)
        shapes[f"{module}.lora_B.{adapter}.weight"] = (rows, config.lora.rank)
    return shapes


def check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ValueError naming the first tensor that is missing, left over, or of a wrong shape or dtype."""
    expected, found = expected_shapes(config), checkpoint.shapes
    spare = {name for name in found if name.endswith(".rotary_emb.inv_freq")}  # a constant that old files carry
    if config.tied_embeddings:
        spare |= {"lm_head.weight"} & set(found)
    for problem, names in (
        ("is missing", set(expected) - set(found)),
        ("is not used", set(found) - set(expected) - spare),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{checkpoint.folder}: tensor {problem}: {some}")
    for name, shape in expected.items():
        kinds = ("U8",) if name == "initialized" else FLOATS
        if found[name] != shape or checkpoint.dtypes[name] not in kinds:
            raise ValueError(
                f"{checkpoint.folder}: {name}: expected {list(shape)} in one of {kinds}, "
                f"got {list(found[name])} {checkpoint.dtypes[name]}"
            )
    for name in spare:
        check_redundant(checkpoint, config, name)


def check_redundant(checkpoint: Checkpoint, config: ModelConfig, name: str) -> None:
    """A tensor that config.json makes redundant must say the same, to the rounding of a half-precision file."""
    tied = name == "lm_head.weight"
    expected = (config.vocab_size, config.hidden_size) if tied else (config.head_size // 2,)
    same = checkpoint.shapes[name] == expected and checkpoint.dtypes[name] in FLOATS
    frequencies = config.rope.frequencies(config.head_size)
    for begin, block in checkpoint.blocks(name) if same else ():
        end = begin + len(block)
        want = checkpoint.rows("model.embed_tokens.weight", begin, end) if tied else frequencies[begin:end]
        same = same and torch.allclose(block.float(), want.float(), rtol=2**-8, atol=2**-24)
    if not same:
        raise ValueError(f"{checkpoint.folder}: {name}: contradicts the value that config.json gives it")


class Loader:
    """Builds a Llama and its Memory from a checkpoint, counting bytes and digesting what passes."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, ops):
        self.config = ModelConfig.from_folder(folder)
        self.checkpoint = Checkpoint(folder)
        check_names(self.checkpoint, self.config)
        self.dtype, self.device, self.ops = dtype, device, ops
        self.digest = hashlib.sha256(str([getattr(self.config, name) for name in FINGERPRINTED]).encode())
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = sum(map(self.checkpoint.bytes, self.checkpoint.shapes))
        self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=None, leave=False)

    def load(self, keep_hidden: bool, seed: int, draw: str) -> tuple[Llama, Memory | None]:
        config = self.config
        embedding = self.tensor("model.embed_tokens.weight")
        layers = [self.layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        norm = self.tensor("model.norm.weight")
        head = embedding if config.tied_embeddings else self.tensor("lm_head.weight")
        bos = self.tensor("bos_embedding")[:, 0] if config.has_bos else None
        write_embedding = self.tensor("new_memory_positional_emb")[0, 0] if config.has_memory else None
        model = Llama(config, embedding, layers, norm, head, bos, write_embedding, self.ops)
        memory = None
        if config.has_memory:
            fingerprint = self.digest.hexdigest()
            memory = Memory(config, fingerprint, self.ops, self.dtype, self.device, keep_hidden, seed, draw)
            if self.checkpoint.read("initialized"):
                self.fill(memory, model)
        self.bar.close()
        return model, memory

    def tensor(self, name: str, out: Tensor | None = None) -> Tensor:
        """Read one tensor into `out` or a new one, block by block."""
        shape = self.checkpoint.shapes[name]
        out = huge_pages.empty(shape, self.dtype, self.device) if out is None else out
        for begin, block in self.blocks(name):
            out[begin : begin + len(block)] = block
        return out

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Blocks of a tensor, checked and entered into the fingerprint."""
        least, greatest, samples, seen = [], [], [], 0
        # Every so many numbers, whatever the blocks; odd, so that a width of 2^n does not always give the same column.
        stride = torch.Size(self.checkpoint.shapes[name]).numel() // SAMPLES | 1
        for begin, block in self.checkpoint.blocks(name):
            low, high = self.check(name, block)
            least.append(low), greatest.append(high)
            samples.append(block.reshape(-1)[-seen % stride :: stride].double())
            seen += block.numel()
            yield begin, block
            self.bar.update(block.numel() * block.element_size())
        self.digest.update(f"{name} {min(least)} {max(greatest)}".encode())
        self.digest.update(torch.cat(samples).numpy())

    def check(self, name: str, block: Tensor) -> tuple[float, float]:
        """The least and greatest number, refused unless finite in the model's dtype."""
        low, high = (number.item() for number in torch.aminmax(block))
        limit = torch.finfo(self.dtype).max
        if not (-limit <= low and high <= limit):
            raise ValueError(f"{name}: expected finite numbers within {self.dtype}, got {low} to {high}")
        return low, high

    def layer(self, prefix: str) -> Layer:
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            input_norm=self.tensor(prefix + "input_layernorm.weight"),
            qkv=self.linear([attention + name for name in ("q_proj", "k_proj", "v_proj")]),
            o=self.linear([attention + "o_proj"]),
            post_norm=self.tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=self.linear([mlp + "gate_proj", mlp + "up_proj"]),
            down=self.linear([mlp + "down_proj"]),
        )

    def linear(self, modules: list[str]) -> Linear:
        """Fuse projections of one input, each with its read adapter merged in and the correction that writers add."""
        names = [self.base_name(module) for module in modules]
        rows = [self.checkpoint.shapes[name][0] for name in names]
        columns = self.checkpoint.shapes[names[0]][1]
        weight = huge_pages.empty((sum(rows), columns), self.dtype, self.device)
        downs, ups = [], []
        for module, name, part in zip(modules, names, weight.split(rows), strict=True):
            if name.endswith(".base_layer.weight"):
                self.merge(module, name, part, downs, ups)
            else:
                self.tensor(name, out=part)
                ups.append(torch.zeros(len(part), 0, dtype=self.wide))
        if not downs:
            return Linear(weight)
        place = {"dtype": self.dtype, "device": self.device}
        return Linear(weight, torch.cat(downs).to(**place), torch.block_diag(*ups).to(**place))

    def base_name(self, module: str) -> str:
        plain = f"{module}.weight"
        return plain if plain in self.checkpoint.shapes else f"{module}.base_layer.weight"

    def merge(self, module: str, name: str, part: Tensor, downs: list[Tensor], ups: list[Tensor]) -> None:
        """part = W + scale B A of the adapter that reads; what writing adds to it is appended to `downs`, `ups`."""
        scale = self.config.lora.scale
        read = "decoder_adapter" if self.config.read_adapter else "default"
        A_read, B_read = self.adapter(module, read)
        for begin, block in self.blocks(name):
            end = begin + len(block)
            merged = block.to(self.wide) + scale * (B_read[begin:end] @ A_read)
            self.check(name, merged)
            part[begin:end] = merged
        if self.config.read_adapter:
            A_write, B_write = self.adapter(module, "default")
            up = scale * torch.cat([B_write, -B_read], dim=1)
            self.check(f"{module}.lora_B.default.weight", up)
            downs.append(torch.cat([A_write, A_read]))
            ups.append(up)

    def adapter(self, module: str, name: str) -> tuple[Tensor, Tensor]:
        A, B = (f"{module}.lora_{letter}.{name}.weight" for letter in "AB")
        shapes = self.checkpoint.shapes
        place = {"dtype": self.wide, "device": "cpu"}
        return self.tensor(A, torch.empty(shapes[A], **place)), self.tensor(B, torch.empty(shapes[B], **place))

    def fill(self, memory: Memory, model: Llama) -> None:
        """Project the shipped pool, one layer's block of rows at a time, and lay it out oldest row first."""
        W = self.config.write_rows
        for begin, block in self.blocks("memory"):
            for i, rows in enumerate(block, start=begin):
                for some, hidden in enumerate(rows.split(PROJECTED_ROWS)):
                    hidden = hidden.to(self.device, self.dtype)
                    slots = slice(some * PROJECTED_ROWS, some * PROJECTED_ROWS + len(hidden))
                    memory.key[i, slots], memory.value[i, slots] = model.project(i, hidden)
                    if memory.hidden_by_slot is not None:
                        memory.hidden_by_slot[i, slots] = hidden
                memory.recent[i] = rows[-W:]
        memory.initialized = True


def load(
    folder: Path, dtype: torch.dtype, device: torch.device, ops, keep_hidden: bool, seed: int, draw: str
) -> tuple[Llama, Memory | None]:
    """The model in `dtype` on `device`, and its memory as shipped, or None for a plain Llama."""
    with torch.inference_mode(False), torch.no_grad():  # tensors that may be updated in any mode later
        return Loader(folder, dtype, device, ops).load(keep_hidden, seed, draw)
