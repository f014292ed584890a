"""Compiles kernels for GPUs this machine does not have and reads what the compiler made of them.

Configurations are what `shipped()` of a `*_configs` module lists; pointers are multiples of 16
even where it does not say so. The compiler runs in a process of its own, because Triton's
interpreter is chosen at import.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fader_adapters.kernels.cuda as cuda
from fader_adapters.kernels.cuda.machines import LEAST_SHARED, codes_arch
from fader_adapters.kernels.cuda.shipped import Shipped

SHARED_LIMIT = {80: 163 * 1024, 89: LEAST_SHARED, 90: 227 * 1024, 120: LEAST_SHARED}
"""Bytes of shared memory one program may have, by what is compiled for."""

TABLES = {80: 80, 89: 80, 90: 90, 120: 90}
"""Whose tables it takes."""

ROOT = Path(__file__).parents[2]

Pick = Literal["kernels", "tiles", "all"]


@dataclass(frozen=True)
class Compiled:
    """One configuration on one architecture; what is 0 or empty if it did not compile."""

    module: str
    kernel: str
    constexprs: dict[str, Any]
    warps: int
    stages: int
    arch: int
    error: str = ""
    shared: int = 0
    spills: int = 0
    """Instructions that store to local memory."""
    loop: dict[str, int] | None = None
    """Instructions of the loop around the matrix instructions, by opcode."""
    buffers: int = 0
    """Turns of a loop that its tiles have shared memory for, of the tile that has the least."""

    @property
    def oversized(self) -> bool:
        return self.shared > SHARED_LIMIT[self.arch]

    @property
    def complaints(self) -> list[str]:
        """Why it must not ship; empty when nothing is wrong."""
        if self.error:
            return [f"{self}: {self.error}"]
        found = []
        if self.spills:
            found.append(f"{self}: {self.spills} spilling stores")
        if self.oversized:
            found.append(f"{self}: {self.shared} bytes of shared memory")
        return found

    def __str__(self) -> str:
        launch = f"warps={self.warps} stages={self.stages}"
        return f"{self.kernel} {self.constexprs} {launch} sm_{self.arch}"


def config_modules() -> list[str]:
    """Every module of the CUDA package that ships configurations."""
    names = (m.name for m in pkgutil.iter_modules(cuda.__path__, f"{cuda.__name__}."))
    return [name for name in names if name.endswith("_configs")]


def compile_shipped(
    modules: Sequence[str], cache: Path, *, pick: Pick, archs: Sequence[int]
) -> list[Compiled]:
    """Compile what the modules' `shipped()` lists, for each of `archs` (keys of TABLES), reusing
    `cache`.

    pick  "kernels": the first configuration of each kernel; "tiles": the first of each kernel and
          set of constants that are no flags; "all"
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    request = json.dumps({"modules": list(modules), "pick": pick, "archs": list(archs)})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.aot"],
        input=request,
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"the compiler process failed:\n{done.stderr[-4000:]}")
    return [Compiled(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def main_loop(sass: str) -> dict[str, int]:
    """Opcodes of the longest loop that holds a matrix instruction, counted; empty without one."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*);", line):
            instructions.append((found[1], found[2]))
    for end, (opcode, operands) in enumerate(instructions):
        target = re.search(r"\((\.L_\S+)\)", operands) if opcode == "BRA" else None
        if target and labels.get(target[1], end + 1) <= end:
            body = [name for name, _ in instructions[labels[target[1]] : end + 1]]
            if {"HMMA", "HGMMA"} & set(body):
                loops.append(body)
    body = max(loops, key=len, default=[])
    return {name: body.count(name) for name in sorted(set(body))}


def _compile(module: str, place: int, arch: int) -> Compiled:
    """What becomes of the entry at a place of the module's list."""
    entry = tuple(importlib.import_module(module).shipped())[place]
    launch = (entry.num_warps, entry.num_stages)
    made = Compiled(module, entry.kernel.__name__, entry.constexprs, *launch, arch)
    try:
        built = _built(entry, arch)
    except Exception as error:  # noqa: BLE001  (whatever the compiler raises is the result)
        return Compiled(**asdict(made) | {"error": f"{type(error).__name__}: {error}"[:2000]})
    sass = _disassemble(built.asm["cubin"])
    spills = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*\bSTL\b", sass, re.MULTILINE))
    turns = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", built.asm["ttgir"])
    result = {
        "shared": built.metadata.shared,
        "spills": spills,
        "loop": main_loop(sass),
        "buffers": min(map(int, turns), default=0),
    }
    return Compiled(**asdict(made) | result)


def _built(entry: Shipped, arch: int) -> Any:
    """What Triton makes of one configuration: its metadata, and its text in each language."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    types, attrs = {}, {}
    for index, name in enumerate(names):
        kind, _, multiple = entry.signature.get(name, "constexpr").partition(":")
        types[name] = kind
        if multiple or kind.startswith("*"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in entry.constexprs.items()}
    source = ASTSource(fn=entry.kernel, signature=types, constexprs=constants, attrs=attrs)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _likeness(entry: Shipped, pick: Pick) -> tuple[object, ...]:
    """What of a configuration must differ from those picked before."""
    kernel, signature, constexprs, *launch = entry[:5]
    if pick == "kernels":
        return (kernel.__name__,)
    if pick == "tiles":
        sizes = {k: v for k, v in constexprs.items() if not isinstance(v, bool)}
        return kernel.__name__, repr(sizes), *launch
    return kernel.__name__, repr((signature, constexprs)), *launch


def _runs_on(entry: Shipped, target: int) -> bool:
    roomy = SHARED_LIMIT[target] > LEAST_SHARED
    table = codes_arch(divmod(target, 10)) if entry.codes else TABLES[target]
    return table in entry.archs and entry.roomy in (None, roomy)


def _picked(
    modules: Sequence[str], pick: Pick, archs: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    """Module, place in its list and architecture of what is compiled."""
    seen = set()
    for name in modules:
        for place, entry in enumerate(importlib.import_module(name).shipped()):
            for arch in (target for target in archs if _runs_on(entry, target)):
                key = (name, arch, *_likeness(entry, pick))
                if key not in seen:
                    seen.add(key)
                    yield name, place, arch


def _worker() -> None:
    request = json.load(sys.stdin)
    wanted = list(_picked(**request))
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(_compile, *zip(*wanted, strict=True)))
    sys.stdout.write("\n" + json.dumps([asdict(made) for made in results]) + "\n")


if __name__ == "__main__":
    _worker()
