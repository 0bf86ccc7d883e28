"""Builds the compiled modules; everything else about the package stands in pyproject.toml.

``SKIALITH_BUILD=debug`` compiles without optimisation and with C assertions, ``SKIALITH_BUILD=asan`` adds the address
and undefined-behaviour sanitizers (run Python with libasan preloaded).
"""

import os
from glob import glob

from setuptools import Extension, setup

FLAGS = {
    "release": (["-O2"], []),
    "debug": (["-O0", "-g", "-UNDEBUG"], []),
    "asan": (
        ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
        ["-fsanitize=address,undefined"],
    ),
}
compile_args, link_args = FLAGS[os.environ.get("SKIALITH_BUILD", "release")]


def extension(name: str) -> Extension:
    """A plain Extension: setuptools runs Cython itself and puts the .pyx into the sdist, which cythonize() does not."""
    path = name.replace(".", "/")
    return Extension(
        name,
        [f"{path}.pyx"],
        depends=glob("skialith/**/*.pxd", recursive=True),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


COMPILED = (
    "skialith._fastpath",
    "skialith._rows",
    "skialith.wal._link",
    "skialith.wal._promise",
    "skialith.wal._protocol",
    "skialith.wal._waiting",
    "skialith.wal._wire",
)

setup(ext_modules=[extension(name) for name in COMPILED])
