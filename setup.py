"""Holds only what pyproject.toml cannot: the extension and the list of packages."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# One wheel for every CPython from 3.11 on: the limited API of 3.11.
LIMITED_API = "0x030B0000"

# No fused multiply-add: the same payloads must give the same bits on every CPU. Roots
# set no errno, so that they vectorise; vectors are never arguments across files.
COMPILE_ARGS = [
    "-O3",
    "-std=gnu11",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
]

# Baseline instruction set only: faster variants are chosen at import by CPU feature.
extensions = [
    Extension(
        "bitnet_ext._kernels",
        ["bitnet_ext/_kernels.pyx", *sorted(glob("bitnet_ext/kernels_*.c"))],
        depends=sorted(glob("bitnet_ext/kernels_*.h") + glob("bitnet_ext/*.pxi")),
        define_macros=[
            ("Py_LIMITED_API", LIMITED_API),
            ("CYTHON_LIMITED_API", "1"),
        ],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
]


class BuildSideBySide(build_ext):
    """Compiles as many files of the extension at a time as there are CPUs."""

    def build_extensions(self) -> None:
        """Compile and link; what is linked has its usual order."""
        compile_files = self.compiler.compile

        def compile_side_by_side(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                each = pool.map(lambda file: compile_files([file], **options), sources)
                return list(chain.from_iterable(each))

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildSideBySide},
    packages=find_packages(
        include=["bitnet_ext*", "coordinator*", "worker*", "webui*"]
    ),
    # Else the files of MANIFEST.in, for the source archive, would enter the wheel.
    include_package_data=False,
    ext_modules=cythonize(extensions, language_level=3),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
