"""setuptools' build backend, plus the one build requirement that depends on the environment: torch, for its headers.

The extension uses only PyTorch's stable ABI, so any torch >= 2.10 will do. The one that is installed where memkernel
goes is preferred: it costs no download, and a download might be of gigabytes.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def torch_folder() -> Path | None:
    """An installed torch >= 2.10, not imported: pip's build isolation hides it from imports, not from sysconfig."""
    paths = sysconfig.get_paths()
    folders = [Path(path) / "torch" for path in (paths["purelib"], paths["platlib"], *sys.path)]
    return next((f for f in folders if (f / "include/torch/csrc/stable/device.h").exists()), None)


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if torch_folder() else [*requirements, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
