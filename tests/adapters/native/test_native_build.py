"""The build helper, a machine without a compiler, and the kernels under the sanitizers."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fader_adapters.kernels.native import build

PACKAGE = Path(build.__file__).resolve().parents[2]
IMPORT = "from fader_adapters.kernels import native as n; "
ANEW = "from fader_adapters.kernels.native import library; library._attempt.cache_clear(); "
"""Code that makes the next look at the library the first one."""
TESTS = Path(__file__).resolve().parent


def clone(to: Path) -> Path:
    """A copy of the package without its library; returns the folder of the native kernels."""
    shutil.copytree(
        PACKAGE, to / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return to / PACKAGE.name / "kernels" / "native"


def python(code: str, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_build_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_leaves_the_old_library_alone(tmp_path: Path) -> None:
    (tmp_path / build.LIBRARY).write_text("old")
    with pytest.raises(build.BuildError):
        build.build(tmp_path, compiler=shutil.which("false") or "/bin/false")
    assert (tmp_path / build.LIBRARY).read_text() == "old"


def test_without_the_library_the_binding_imports_and_gives_the_reason(tmp_path: Path) -> None:
    library = clone(tmp_path) / build.LIBRARY
    told = "print(n.available(), n.reason()); "
    broken = f"open({str(library)!r}, 'w').write('not a library'); "
    absent, useless = python(IMPORT + told + broken + ANEW + told, tmp_path).stdout.splitlines()
    assert absent.startswith("False libfader_kernels.so was not built")
    assert useless.startswith("False libfader_kernels.so does not load")


def test_the_environment_chooses_the_instruction_set(built: None) -> None:
    told = "print(n.available() and n.isa(), n.reason()); "
    other = "import os; os.environ['FADER_CPU_ISA'] = 'mmx'; "
    done = python(IMPORT + told + other + ANEW + told, PACKAGE.parent, FADER_CPU_ISA="scalar")
    scalar, unknown = done.stdout.splitlines()
    assert scalar.startswith("scalar")
    assert "must be one of" in unknown


@pytest.mark.slow
@pytest.mark.skipif(
    platform.system() != "Linux" or not shutil.which("g++"), reason="needs g++ on Linux"
)
def test_kernels_are_clean_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    build.build(clone(tmp_path), sanitise=True)
    runtime = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    files = sorted(str(f) for f in TESTS.glob("test_native_*.py") if f.name != Path(__file__).name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, report
    assert "passed" in done.stdout
    assert "runtime error" not in report
