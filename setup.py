"""Builds the native module, the simulated CUDA driver and, where there is a compiler for them, the
weight kernels for GPUs. Everything else is in pyproject.toml.

WARMSERVE_KERNELS says where nvcc comes from: "system" (CUDA_HOME or PATH), "pypi" (packages in the
build's own environment), "none" (no kernels for GPUs), or "auto", the default: the system's; else
PyPI's where there is an NVIDIA device; else none. If nvcc was not asked for by name and fails, the
package is built without. WARMSERVE_SANITIZE is what to pass to -fsanitize, for the tests of the
native code under pytest, and WARMSERVE_OBJECTS a folder with what tests/native has compiled so
already; WARMSERVE_BUILD_JOBS how many compilers run at once.
"""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]
# The weight kernels become vector code at -O3, and branches with floating point in them only where
# nobody traps its exceptions.
FLAGS = ["-O3", "-fno-trapping-math", "-g0", "-Wall", "-Wextra"]
SANITIZE = os.environ.get("WARMSERVE_SANITIZE")
if SANITIZE:
    optimise = "-O1" if SANITIZE == "thread" else "-Og"  # as tests/native/Makefile does, and why
    FLAGS = [f"-fsanitize={SANITIZE}", optimise, "-g1", "-fno-omit-frame-pointer"]
OBJECTS = os.environ.get("WARMSERVE_OBJECTS")
LINK = ["-pthread", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])]
SIMULATOR = "warmserve_rt.libwarmserve_simcuda"

# The folders of csrc/ that make the core, below bind/; csrc/README.md has their order.
LAYERS = ("runtime", "load", "checkpoint", "model", "memory", "driver", "kernels", "base")
KERNELS = "csrc/kernels/weight_kernels.cu"
FATBIN = "warmserve_rt/weight_kernels.fatbin"
ARCHITECTURES = (80, 90, 100)  # those of them that nvcc knows, and PTX of the first
TOOLKIT = [  # later ones write PTX that fewer drivers understand
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).rglob("*.cpp"))


def parts(*folders: str, beside: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """What is in these folders, as sources, or as objects where there are some; and the sources
    that are in those ``beside``."""
    if OBJECTS is None:
        return {"sources": sources(*folders, *beside)}
    made = [Path(OBJECTS, each).with_suffix(".o") for each in sources(*folders)]
    return {"sources": sources(*beside), "extra_objects": [*map(str, made)]}


def is_older(built: str, source: str) -> bool:
    """Whether an object is older than its source or any header."""
    if not os.path.exists(built):
        return True
    return os.path.getmtime(built) < max(map(os.path.getmtime, [source, *HEADERS]))


def system_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=Path(home, "bin"))) or shutil.which("nvcc")


def pypi_nvcc() -> str | None:
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.match("bin/nvcc")), None)


def kernels_from() -> str:
    """ "system", "pypi" or "none"."""
    choice = os.environ.get("WARMSERVE_KERNELS", "auto")
    if choice not in ("system", "pypi", "none", "auto"):
        sys.exit(f"WARMSERVE_KERNELS is {choice!r}: choose system, pypi, none or auto")
    if choice != "auto":
        return choice
    if system_nvcc():
        return "system"
    return "pypi" if os.path.exists("/dev/nvidiactl") else "none"


def compile_kernels(nvcc: str, output: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    known = run("--list-gpu-code").split()
    wanted = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    targets.append(f"-gencode=arch=compute_{wanted[0]},code=compute_{wanted[0]}")
    if "--compress-mode" in run("--help"):
        targets.append("--compress-mode=size")
    output.parent.mkdir(parents=True, exist_ok=True)
    run("-fatbin", "-std=c++20", "-Icsrc", *targets, KERNELS, "-o", str(output))


class Build(build_ext):
    """The simulator is a library that programs open by its name, and no Python module; the kernels
    are data.
    """

    def run(self) -> None:
        super().run()
        output = Path(FATBIN) if self.inplace else Path(self.build_lib, FATBIN)
        output.unlink(missing_ok=True)
        source = kernels_from()
        if source == "none":
            return
        try:
            nvcc = system_nvcc() if source == "system" else pypi_nvcc()
            if nvcc is None:
                raise RuntimeError(f"WARMSERVE_KERNELS is {source!r}, and there is no such nvcc")
            compile_kernels(nvcc, output)
        except (RuntimeError, OSError) as error:
            output.unlink(missing_ok=True)
            if os.environ.get("WARMSERVE_KERNELS", "auto") != "auto":
                raise
            self.warn(f"built without the weight kernels for GPUs: {error}")

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == SIMULATOR.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if ext.name == SIMULATOR else super().get_export_symbols(ext)


ParallelCompile("WARMSERVE_BUILD_JOBS", needs_recompile=is_older).install()

setup(
    cmdclass={"build_ext": Build},
    setup_requires=TOOLKIT if kernels_from() == "pypi" else [],
    ext_modules=[
        Pybind11Extension(
            "warmserve_rt._native",
            **parts(*LAYERS, beside=("bind",)),
            depends=HEADERS,
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
        ),
        Extension(
            SIMULATOR,
            **parts("simcuda", "kernels"),
            depends=HEADERS,
            include_dirs=["csrc"],
            extra_compile_args=["-std=c++20", "-fvisibility=hidden", *FLAGS],
            extra_link_args=[*LINK, "-Wl,-soname,libwarmserve_simcuda.so"],
            language="c++",
        ),
    ],
)
