"""Memory files: safetensors with metadata and a digest, written so that no interruption leaves half a file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = "memkernel.memory.1"


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to `path` through a file beside it: written, fsynced, renamed.

    A process killed meanwhile leaves that file, `.NAME.PID.partial`, and `path` as it was.
    Raises ValueError if the folder does not exist, OSError if the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"path: expected a file name in an existing folder, got {str(path)!r}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata | {"format": FORMAT}
    metadata["digest"] = _digest(tensors, metadata)

    def write(partial: Path) -> None:
        try:
            safetensors.torch.save_file(tensors, partial, metadata)
        except safetensors.SafetensorError as error:  # what it makes of a full disk, say
            raise OSError(f"{path}: {error}") from error

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file beside `path`, then fsync and rename it: whatever interrupts this, `path` is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        _fsync(partial)
        os.replace(partial, path)
        _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a memory file whole and check its digest. Returns CPU tensors and the metadata.

    Raises ValueError if it is missing, not a memory file, truncated or altered.
    """
    metadata, _ = header(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    digest = metadata.pop("digest", None)
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{path}: expected contents with digest {digest}, got others: the file was altered or damaged")
    return tensors, metadata


def header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[list[int], str]]]:
    """Metadata, and name -> (shape, dtype), without reading the tensors. Raises ValueError as `load` does."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a memory file, found none")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {
                name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype())
                for name in sorted(file.keys())
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole memory file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT!r}, got {metadata.get('format')!r}")
    return metadata, tensors


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """sha256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
