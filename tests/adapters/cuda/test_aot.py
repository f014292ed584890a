"""Every configuration that can ship compiles for sm_80 and sm_90, and for machines of less shared
memory that take their tables, without spills and within that memory; the NF4 decode loop stays
within its budget of instructions."""

from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="kernels are compiled with Triton, which is not installed")

from fader_adapters.kernels.cuda.machines import ARCHS
from tests.support import aot

NF4 = "fader_adapters.kernels.cuda.nf4_configs"
EXPERTS = "fader_adapters.kernels.cuda.nf4_expert_configs"
FOLLOWING = ("attention_configs", "lora_configs")
"""Modules of kernels whose loops follow tables: of a cache's blocks, of an arena's rows."""
FOLLOWERS = ("decode_kernel", "prefill_kernel", "expand", "join", "followed")
NEGATIVES = "tests.adapters.cuda.aot_negatives"

LOOP_BUDGET = {
    (80, 16, 128): 7.3,
    (80, 32, 128): 8.8,
    (80, 64, 128): 11.0,
    (80, 128, 128): 20.5,
    (90, 16, 128): 5.7,
    (90, 32, 128): 6.0,
    (90, 64, 128): 6.6,
    (90, 128, 128): 9.2,
    (80, 16, 64): 8.5,
    (90, 16, 64): 7.0,
}
"""Instructions a weight in the main loop, per architecture, rows of x and of W in a tile; about 4
would be free at the bandwidth of an H200, and a select tree takes 24."""

Compile = Callable[..., list[aot.Compiled]]


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile modules' configurations, each request once a session, machine code kept between
    sessions where pytest has a cache."""
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    folder = tmp_path_factory.mktemp("aot") if cache is None else cache.mkdir("aot")
    results: dict[object, list[aot.Compiled]] = {}

    def run(modules: tuple[str, ...], *archs: int, pick: aot.Pick = "all") -> list[aot.Compiled]:
        if (modules, archs, pick) not in results:
            made = aot.compile_shipped(modules, folder, pick=pick, archs=archs)
            results[modules, archs, pick] = made
        return results[modules, archs, pick]

    return run


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


each_when_slow = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHS]
)
"""Looked at for one in every run, for all in the slow one."""


def per_weight(made: aot.Compiled) -> float:
    """Instructions of the main loop over the weights a thread decodes in a turn of it."""
    assert made.loop
    return sum(made.loop.values()) / (made.constexprs["BN"] * 64 / (32 * made.warps))


def products(found: list[aot.Compiled]) -> list[aot.Compiled]:
    """Those that look codes up in registers."""
    kernels = ("nf4_gemm", "nf4_experts")
    return [made for made in found if made.kernel in kernels and not made.constexprs["EXACT"]]


def tile_of(made: aot.Compiled) -> tuple[int, int, int]:
    return made.arch, made.constexprs["BM"], made.constexprs["BN"]


def over_budget(found: list[aot.Compiled]) -> list[str]:
    return [
        f"{made}: {per_weight(made):.2f} instructions a weight"
        for made in found
        if per_weight(made) > LOOP_BUDGET[tile_of(made)]
    ]


def waiting_loads(found: list[aot.Compiled]) -> list[str]:
    """Loads in the main loop that are not copied ahead of their use."""
    return [f"{made}: {made.loop['LDG']} loads" for made in found if "LDG" in (made.loop or {})]


def shallow(found: list[aot.Compiled]) -> list[str]:
    """Loops through tables whose copies run fewer turns ahead than their stages are meant for."""
    return [
        f"{made}: room for {made.buffers} turns"
        for made in found
        if made.kernel in FOLLOWERS and made.buffers < made.stages - 1
    ]


def test_the_modules_of_the_package_are_discovered() -> None:
    assert NF4 in aot.config_modules()
    assert NEGATIVES not in aot.config_modules()


def test_each_kernel_compiles_without_spills_and_within_shared_memory(
    compiled: Compile, arch: int
) -> None:
    found = compiled(tuple(aot.config_modules()), arch, pick="kernels")
    assert {made.arch for made in found} == {arch}
    assert {made.module for made in found} == set(aot.config_modules())
    assert [line for made in found for line in made.complaints] == []
    decoding = products(found)
    assert {made.kernel for made in decoding} == {"nf4_gemm", "nf4_experts"}
    assert over_budget(decoding) == []
    assert waiting_loads(decoding) == []


SMALL = (89, 120)
"""Machines that are not roomy: of sm_80's tables and of sm_90's."""


@pytest.mark.parametrize("arch", SMALL)
def test_attention_fits_machines_of_less_shared_memory(compiled: Compile, arch: int) -> None:
    modules = tuple(name for name in aot.config_modules() if name.endswith("attention_configs"))
    found = compiled(modules, arch, pick="kernels")
    assert [line for made in found for line in made.complaints] == []
    (prefill,) = [made for made in found if made.kernel == "prefill_kernel"]
    assert prefill.constexprs["DIM"] == 256
    assert 64 << 10 < prefill.shared <= 99 << 10


@each_when_slow
def test_a_spill_an_oversize_and_an_error_are_seen(compiled: Compile, arch: int) -> None:
    tree, spilling, too_big, broken, _ = compiled((NEGATIVES,), arch)
    assert not tree.complaints
    assert "spilling stores" in spilling.complaints[0]
    assert "bytes of shared memory" in too_big.complaints[0]
    assert broken.error


@each_when_slow
def test_a_table_that_is_followed_turn_by_turn_is_seen(compiled: Compile, arch: int) -> None:
    found = compiled((NEGATIVES,), arch)
    assert ["followed" in line for line in shallow(found)] == [True]


@each_when_slow
def test_loops_through_tables_copy_ahead(compiled: Compile, arch: int) -> None:
    modules = [name for name in aot.config_modules() if name.endswith(FOLLOWING)]
    found = compiled(tuple(modules), arch, pick="kernels")
    assert {made.kernel for made in found} > {*FOLLOWERS} - {"followed"}
    assert shallow(found) == []


@each_when_slow
def test_a_select_tree_and_a_waiting_load_are_seen(compiled: Compile, arch: int) -> None:
    trees = [made for made in compiled((NEGATIVES,), arch) if made.kernel == "select_tree"]
    trees = [made for made in trees if not made.error]
    assert len(trees) == len(over_budget(trees)) == len(waiting_loads(trees)) == 1


def test_products_over_codes_are_compiled_for_machines_of_less_shared_memory(
    compiled: Compile,
) -> None:
    """By sm_80's table on sm_120, too, which has the matrix instructions that those have."""
    found = products(compiled((NF4, EXPERTS), 120, pick="kernels"))
    assert {made.kernel for made in found} == {"nf4_gemm", "nf4_experts"}
    assert [str(made) for made in found if made.error or made.oversized or made.spills > 4] == []
    assert ["HMMA" in (made.loop or {}) for made in found] == [True, True]
    assert waiting_loads(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_decode_loop_keeps_to_its_budget_and_never_waits(compiled: Compile, arch: int) -> None:
    linears = products(compiled((NF4,), arch, pick="tiles"))
    experts = products(compiled((EXPERTS,), arch, pick="tiles"))
    budgets = {key for key in LOOP_BUDGET if key[0] == arch}
    assert {tile_of(made) for made in linears} < {tile_of(made) for made in experts} == budgets
    found = linears + experts
    assert over_budget(found) == []
    assert waiting_loads(found) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all_tiles_of_an_architecture_use_one_matrix_instruction(
    compiled: Compile, arch: int
) -> None:
    """Else a row's bits would change with the number of rows."""
    found = compiled((NF4,), arch, pick="tiles") + compiled((EXPERTS,), arch, pick="tiles")
    for made in products(found):
        used = {"HMMA", "HGMMA"} & set(made.loop or {})
        assert used == {"HGMMA" if made.arch == 90 else "HMMA"}, str(made)


@pytest.mark.slow
def test_every_shipped_configuration_fits_machines_of_less_shared_memory(compiled: Compile) -> None:
    found = compiled(tuple(aot.config_modules()), *SMALL)
    assert {made.arch for made in found} == {*SMALL}
    assert {made.arch for made in products(found)} == {*SMALL}
    assert [str(made) for made in found if made.error or made.oversized] == []


@pytest.mark.slow
def test_every_shipped_configuration_compiles(compiled: Compile) -> None:
    found = compiled(tuple(aot.config_modules()), *ARCHS)
    assert [line for made in found for line in made.complaints] == []
    assert over_budget(products(found)) == []
    assert waiting_loads(products(found)) == []
    assert shallow(found) == []
