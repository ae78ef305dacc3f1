"""Build the native CPU operators: one shared library per supported instruction set."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kernels.native.levels import FLAGS, library_path, supported_levels

_SOURCE = Path(__file__).parent / "library.cpp"
_TORCH = Path(torch.__file__).parent


def compiler() -> str | None:
    """Return the path of the C++ compiler: ``CXX`` if set, else g++ or clang++. None if it does not exist."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def build(level: str, cxx: str) -> None:
    """Compile the library for one level into the cache. Raises RuntimeError with the first error of the compiler."""
    target = library_path(level)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        include = _TORCH / "include"
        # Without NDEBUG, PyTorch's headers declare other class layouts than its library has.
        command = [cxx, "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno"]
        command += ["-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
        command += FLAGS[level]
        command += [f"-I{include}", str(_SOURCE), "-o", str(made)]
        # Link the OpenMP runtime of PyTorch. A second one would start its own threads.
        command += [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{_TORCH / 'lib'}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise RuntimeError(errors[0].strip() if errors else f"{cxx} exited with status {run.returncode}")
        digest = made.with_name(made.name + ".sha256")
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        digest.replace(target.with_name(digest.name))
        made.replace(target)


def main() -> int:
    """Build all missing libraries. Returns 0 even if that fails, because the operators are optional."""
    levels = [level for level in supported_levels() if not library_path(level).exists()]
    if not levels:
        return 0
    cxx = compiler()
    if cxx is None:
        print(
            "native CPU operators: no C++ compiler found; PyTorch's operators run instead, several times slower. "
            "Install g++ and run `make native`.",
            file=sys.stderr,
        )
        return 0
    print(f"native CPU operators: compiling for {', '.join(levels)} (about half a minute, once)", flush=True)
    with ThreadPoolExecutor(2) as pool:
        for level, result in [(level, pool.submit(build, level, cxx)) for level in levels]:
            try:
                result.result()
            except (OSError, RuntimeError) as error:
                print(
                    f"native CPU operators: {level}: {error}; PyTorch's operators run instead, several times slower",
                    file=sys.stderr,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
