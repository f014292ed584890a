"""What a server can compile, as the ahead-of-time test builds it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fader_adapters.kernels.cuda.machines import ARCHS


class Shipped(NamedTuple):
    """One compiled variant of a Triton kernel.

    signature is {argument: type}, ":16" marking multiples of 16; the constants may stand in it as
    "constexpr".
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS
    """Whose tables have it."""
    roomy: bool | None = None
    """Whether it runs only on machines that are, or that are not; None: on both."""
    codes: bool = False
    """Whether machines.codes_arch says whose tables a device takes, not machines.arch_of."""


def signature_of(
    kernel: Any,  # noqa: ANN401
    types: Mapping[Any, str],
    constants: Mapping[str, int | bool],
) -> dict[str, str]:
    """Of every argument of a kernel; those of which `types` says nothing are int32."""
    names: Iterable[str] = kernel.arg_names
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}


def joined(found: Iterable[Shipped]) -> list[Shipped]:
    """Each variant once, with every architecture that launches it."""
    every: dict[object, Shipped] = {}
    for entry in found:
        types = entry.signature.items()
        key = (entry.kernel.__name__, *types, *entry.constexprs.items(), *entry[3:5], *entry[6:])
        before = every.get(key)
        archs = entry.archs if before is None else (*before.archs, *entry.archs)
        every[key] = entry._replace(archs=archs)
    return list(every.values())
