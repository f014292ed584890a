"""Which tables of launches a GPU takes, by its compute capability. Integers; reads no device."""

from typing import Literal

Capability = tuple[int, int]
Arch = Literal[80, 90]
ARCHS: tuple[Arch, ...] = (80, 90)
"""Architectures of which every table has rows."""

LEAST_SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on any GPU from 8.0 on."""


def arch_of(capability: Capability) -> Arch:
    """The rows for a device: Hopper's from 9.0 on, else Ampere's."""
    return 90 if capability >= (9, 0) else 80


def codes_arch(capability: Capability) -> Arch | None:
    """The rows of kernels that choose their instructions by hand, where they were compiled for the
    device: GeForce's Blackwell has the matrix instructions that Ampere has. Else None."""
    if capability[0] in (8, 12):
        return 80
    return 90 if capability == (9, 0) else None


def roomy(capability: Capability) -> bool:
    """Whether a program may have more than LEAST_SHARED: 163 KiB at least, on the cards of data
    centres. GeForce, RTX and L cards (8.6, 8.9, 12.0) have no more than that."""
    return capability in ((8, 0), (8, 7)) or capability[0] in (9, 10, 11)
