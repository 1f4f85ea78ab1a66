"""Builds the native module; everything else is in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

SOURCES = sorted(
    str(path) for folder in (".", "driver", "bind") for path in Path("csrc", folder).glob("*.cpp")
)
HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]


def is_older(built: str, source: str) -> bool:
    """Whether an object is older than its source or any header."""
    if not os.path.exists(built):
        return True
    return os.path.getmtime(built) < max(map(os.path.getmtime, [source, *HEADERS]))


ParallelCompile("WARMSERVE_BUILD_JOBS", needs_recompile=is_older).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "warmserve_rt._native",
            SOURCES,
            depends=HEADERS,
            include_dirs=["csrc"],
            cxx_std=20,
            extra_compile_args=["-O2", "-g0", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ]
)
