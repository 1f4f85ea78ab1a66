"""Builds the native module; everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, naive_recompile
from setuptools import setup

ParallelCompile("WARMSERVE_BUILD_JOBS", needs_recompile=naive_recompile).install()

SOURCES = sorted(
    str(path) for folder in (".", "driver", "bind") for path in Path("csrc", folder).glob("*.cpp")
)

setup(
    ext_modules=[
        Pybind11Extension(
            "warmserve_rt._native",
            SOURCES,
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=["-O2", "-g0", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ]
)
