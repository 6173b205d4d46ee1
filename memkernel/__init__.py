"""memkernel: self-updating language models, computed exactly as published and without the waste.

engine = memkernel.Engine.from_pretrained("YuWangX/memoryllm-8b-chat")
engine.update("David said that he likes apples. " * 3)
engine.generate("What fruit does David like? Answer:").text
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "Memory", "ModelConfig", "SamplingParams", "Update", "kernels", "ops", "reference"]

_HOMES = {
    "Completion": "request",
    "Engine": "engine",
    "Memory": "memory",
    "ModelConfig": "config",
    "SamplingParams": "sampling",
    "Update": "engine",
}


def __getattr__(name: str):
    """Import on first use, so that `memkernel --help` answers without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"memkernel.{_HOMES[name]}"), name)
    if name in ("kernels", "ops", "reference"):
        return importlib.import_module(f"memkernel.{name}")
    raise AttributeError(f"module 'memkernel' has no attribute {name!r}")
