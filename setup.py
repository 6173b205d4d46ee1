"""Build script of the CPU extension; the metadata stands in pyproject.toml.

csrc/*.cpp is compiled once, csrc/cpu/*.cpp once per instruction set. Where that fails (no compiler, no torch headers)
memkernel is installed without the extension and computes with its reference ops.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_backend import torch_folder

FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"portable": []}


class Build(build_ext):
    def run(self):
        self.force = True  # flags may have changed, which no time stamp tells
        built = [Path(self.build_lib) / self.get_ext_filename("memkernel._C")]
        built += [Path(self.get_ext_fullpath("memkernel._C"))] * bool(self.inplace)
        for path in built:  # if this build fails, no older one must be left to be used
            path.unlink(missing_ok=True)
        super().run()

    def build_extension(self, extension):
        torch = torch_folder()
        if torch is None:
            raise CompileError("found no torch >= 2.10, whose headers the extension needs")
        extension.include_dirs = [str(torch / "include")]
        extension.library_dirs, extension.libraries = [str(torch / "lib")], ["torch_cpu"]
        jobs = [(source, "once", []) for source in sorted(glob("csrc/*.cpp"))]
        for isa, flags in ISAS.items():
            flags = [*flags, f"-DMEMKERNEL_ISA={isa}"]
            jobs += [(source, isa, flags) for source in sorted(glob("csrc/cpu/*.cpp"))]

        def compile(source: str, folder: str, flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, folder),
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                extra_postargs=[*FLAGS, *flags],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for compiled in pool.map(lambda job: compile(*job), jobs) for o in compiled]
        extension.sources, extension.extra_objects = [], objects
        super().build_extension(extension)


setup(
    ext_modules=[
        Extension(
            "memkernel._C",
            sources=[*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")],
            depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h")],
            define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
            py_limited_api=True,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
