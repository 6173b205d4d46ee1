"""Build script of the extensions; the metadata stands in pyproject.toml.

For CPUs csrc/*.cpp is compiled once, csrc/cpu/*.cpp once per instruction set; csrc/cuda/ only where there are nvcc and
a CUDA build of torch. Where that fails (no compiler, no torch headers) memkernel is installed without the extension and
computes with its other ops; the reason lies beside the modules, where `memkernel env` finds it.
"""

import os
import platform
import shutil
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
    "-Wno-unknown-warning-option",  # clang does not know the one above
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
NVCC_FLAGS = [
    "-shared",
    "-O3",
    "-std=c++17",
    "-arch=all-major",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"portable": []}


def nvcc() -> str | None:
    """The CUDA compiler, where the extensions are for a torch that has CUDA."""
    torch = torch_folder()
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))  # its bin is not on every PATH
    found = shutil.which("nvcc") or shutil.which("nvcc", path=home / "bin")
    return found if torch and (torch / "lib/libtorch_cuda.so").exists() else None


class Build(build_ext):
    def run(self):
        self.force = True  # flags may have changed, which no time stamp tells
        self.failures: dict[str, Exception] = {}
        places = {}  # of each extension, and of the reason why it is not there
        for name in ("memkernel._C", "memkernel._cuda"):  # whichever are built now
            built = [Path(self.build_lib) / self.get_ext_filename(name)]
            built += [Path(self.get_ext_fullpath(name))] * bool(self.inplace)
            places[name] = [path.with_name(name.rpartition(".")[2] + ".failed.txt") for path in built]
            for path in (*built, *places[name]):  # if this build fails, no older one must be left to be used
                path.unlink(missing_ok=True)
        super().run()
        for name, error in self.failures.items():
            for path in places[name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{error}\n", "utf-8")

    def build_extension(self, extension):
        try:
            self.build(extension)
        except Exception as error:
            self.failures[extension.name] = error
            raise

    def build(self, extension):
        torch = torch_folder()
        if torch is None:
            raise CompileError("found no torch >= 2.10, whose headers the extension needs")
        if extension.name == "memkernel._cuda":
            return self.build_cuda(extension, torch)
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

    def build_cuda(self, extension, torch: Path):
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        macros = [f"-D{name}={value}" for name, value in [*extension.define_macros, ("USE_CUDA", "1")]]
        includes = [f"-I{folder}" for folder in (torch / "include", *self.include_dirs)]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
        self.spawn([nvcc(), *NVCC_FLAGS, *macros, *includes, *extension.sources, *libraries, "-o", str(path)])


def extension(name: str, *folders: str) -> Extension:
    return Extension(
        f"memkernel.{name}",
        sources=[
            source for folder in folders for kind in ("cpp", "cu") for source in sorted(glob(f"{folder}/*.{kind}"))
        ],
        depends=[header for folder in folders for header in glob(f"{folder}/*.h")],
        define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        py_limited_api=True,
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[extension("_C", "csrc", "csrc/cpu"), *([extension("_cuda", "csrc/cuda")] if nvcc() else [])],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
