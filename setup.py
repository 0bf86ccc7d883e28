"""Builds skialith._fastpath and skialith._rows; everything else about the package stands in pyproject.toml.

``SKIALITH_BUILD=debug`` compiles without optimisation and with C assertions, ``SKIALITH_BUILD=asan`` adds the address
and undefined-behaviour sanitizers (run Python with libasan preloaded).
"""

import os

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

setup(
    ext_modules=[
        # A plain Extension: setuptools runs Cython itself and puts the .pyx into the sdist, which cythonize() does not.
        Extension(
            f"skialith.{name}",
            [f"skialith/{name}.pyx"],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
        for name in ("_fastpath", "_rows")
    ]
)
