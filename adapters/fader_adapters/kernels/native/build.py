"""Compiles csrc/ into one shared library beside this file. Knows compilers and flags; needs only
the
standard library, so that the package build can load it by path. `python -m
fader_adapters.kernels.native.build`."""

import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = "libfader_kernels.so"
BASE = [
    "-O3",
    "-g1",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    # a product and a sum round twice unless the source says fma: bits must not depend on inlining
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # GCC's own AVX-512 headers trip these two
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
LEVELS: dict[str, list[str]] = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": AVX512,
    "isa_avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
}
SANITISE = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=undefined,float-cast-overflow",
    "-O1",
]


class BuildError(RuntimeError):
    """No compiler, or it refused the sources; the message holds its own words."""


def find_compiler() -> str:
    """GCC's C++ driver: its libgomp is the OpenMP runtime that torch's Linux wheels load."""
    for name in ("g++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        "no C++ compiler found (looked for g++ and c++); install one to get the fast CPU kernels"
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()[-2000:]}")


def build(out_dir: Path = HERE, *, compiler: str | None = None, sanitise: bool = False) -> Path:
    """Build the library into `out_dir` and return its path.

    An old library is replaced only after a complete build.
    Raises: BuildError when there is no compiler or it fails.
    """
    cxx = compiler or find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = ["api", "plan", "program", "team", "isa_scalar", *(LEVELS if x86 else ())]
    extra = ([] if x86 else ["-DFADER_NO_X86"]) + (SANITISE if sanitise else [])
    with tempfile.TemporaryDirectory() as tmp:
        objects = {name: str(Path(tmp) / f"{name}.o") for name in names}
        jobs = [
            [
                cxx,
                *BASE,
                *LEVELS.get(name, []),
                *extra,
                "-c",
                str(SOURCES / f"{name}.cpp"),
                "-o",
                to,
            ]
            for name, to in objects.items()
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, jobs))
        staged = Path(tmp) / LIBRARY
        link = [cxx, "-shared", "-fopenmp", *(SANITISE if sanitise else [])]
        _run([*link, *objects.values(), "-Wl,--as-needed", "-o", str(staged)])
        out_dir.mkdir(parents=True, exist_ok=True)
        partial = out_dir / f"{LIBRARY}.partial"
        shutil.copyfile(staged, partial)
        partial.replace(out_dir / LIBRARY)
    return out_dir / LIBRARY


def main() -> int:
    """Build in place; 0 on success, 1 with the compiler's words on standard error."""
    try:
        sys.stdout.write(f"{build()}\n")
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
