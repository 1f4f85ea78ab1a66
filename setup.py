"""Builds the native module, the simulated CUDA driver and, if a compiler for them is found, the
weight kernels for GPUs. Everything else is in pyproject.toml.

Environment variables:

WARMSERVE_KERNELS
    Where nvcc is taken from: "system" (CUDA_HOME or PATH), "pypi" (packages in the build's own
    environment), "none" (no kernels for GPUs), or "auto", the default: the system's nvcc, else
    PyPI's if the machine has an NVIDIA device, else none. If nvcc was chosen by "auto" and fails,
    the package is built without kernels for GPUs.
WARMSERVE_BUILD_JOBS
    How many compilers run at once.
WARMSERVE_CXXFLAGS
    Further arguments of the C++ compiler. They come last, so that "-O0" replaces "-O3".
WARMSERVE_SANITIZE
    The argument of -fsanitize, for running the suite on instrumented native code.
WARMSERVE_OBJECTS
    A folder of objects that tests/native has compiled in the same way; they are linked instead of
    compiling again.
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

HEADERS = [str(path) for end in ("h", "inl") for path in Path("csrc").rglob(f"*.{end}")]
# At -O3 the compiler vectorizes the weight kernels. It vectorizes branches with floating point in
# them only if floating-point exceptions do not trap. The rest is a tenth smaller at -O2.
FLAGS = ["-fno-trapping-math", "-g0", "-Wall", "-Wextra"]
FAST = ("csrc/kernels/kernels.cpp", "csrc/driver/host/copies.cpp")  # at -O3
SANITIZE = os.environ.get("WARMSERVE_SANITIZE")
if SANITIZE:
    optimise = "-O1" if SANITIZE == "thread" else "-Og"  # tests/native/Makefile says why
    FLAGS = [f"-fsanitize={SANITIZE}", optimise, "-g1", "-fno-omit-frame-pointer"]
FLAGS += os.environ.get("WARMSERVE_CXXFLAGS", "").split()
OBJECTS = os.environ.get("WARMSERVE_OBJECTS")
# Without symbols a wheel is 0.1 MB smaller.
LINK = ["-pthread", f"-fsanitize={SANITIZE}" if SANITIZE else "-Wl,--strip-all"]
SIMULATOR = "warmserve_rt.libwarmserve_simcuda"

# The folders of csrc/ that make the core, below bind/; csrc/README.md has their order.
LAYERS = (
    "broker",
    "runtime",
    "load",
    "checkpoint",
    "model",
    "wire",
    "memory",
    "driver",
    "kernels",
    "base",
)
KERNELS = "csrc/kernels/weight_kernels.cu"
FATBIN = "warmserve_rt/weight_kernels.fatbin"
ARCHITECTURES = (80, 90, 100)  # built if nvcc knows them; PTX is built for the first
TOOLKIT = [  # later versions write PTX that fewer drivers understand
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).rglob("*.cpp"))


def parts(*folders: str, beside: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the arguments of Extension for these folders: their sources, or their objects if
    WARMSERVE_OBJECTS is set, and always the sources of the folders `beside`."""
    if OBJECTS is None:
        return {"sources": sources(*folders, *beside)}
    made = [Path(OBJECTS, each).with_suffix(".o") for each in sources(*folders)]
    return {"sources": sources(*beside), "extra_objects": [*map(str, made)]}


def is_older(built: str, source: str) -> bool:
    """Return whether an object is older than its source or any header."""
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
    """Return "system", "pypi" or "none"."""
    choice = os.environ.get("WARMSERVE_KERNELS", "auto")
    if choice not in ("system", "pypi", "none", "auto"):
        sys.exit(f"WARMSERVE_KERNELS must be system, pypi, none or auto, got {choice!r}")
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
    """Builds the simulator as a plain library, because programs open it by its name, and the
    kernels for GPUs as a data file.
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
                raise RuntimeError(f"WARMSERVE_KERNELS is {source!r}, but no such nvcc was found")
            compile_kernels(nvcc, output)
        except (RuntimeError, OSError) as error:
            output.unlink(missing_ok=True)
            if os.environ.get("WARMSERVE_KERNELS", "auto") != "auto":
                raise
            self.warn(f"built without the weight kernels for GPUs: {error}")

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_level(
            made: str, source: str, end: str, first: list[str], last: list[str], defines: list[str]
        ) -> None:
            level = "-O3" if source in FAST else "-O2"
            compile_one(made, source, end, first, [level, *last], defines)

        self.compiler._compile = compile_with_level
        super().build_extensions()

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
            depends=[*HEADERS, KERNELS],  # a source distribution holds what is listed here
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
