"""How large an adapter may be and how long a source may take. Plain bounds; reads nothing."""

from dataclasses import dataclass, replace
from typing import Self

from fader_adapters.pattern_nodes import WORK
from fader_adapters.spec import BaseSpec

_NAMED = 256
"""Bytes of a header that one tensor takes, at most."""
_LOOKED_AT = 256
"""Work of patterns for one module."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds checked before anything is read, allocated or computed; all are inclusive."""

    file_bytes: int = 8 << 30
    """Size of adapter_model.safetensors; a large base's embedding and head take some of it."""
    config_bytes: int = 256 << 10
    """Size of adapter_config.json."""
    header_bytes: int = 1 << 20
    """Size of the safetensors header."""
    tensors: int = 4096
    rank: int = 512
    """Rank of one linear."""
    invocation: int = 256
    """Tokens that activate an adapter."""
    pattern_work: int = WORK
    """Of evaluating a config's patterns, in node visits."""
    alpha: float = 1e6
    delta_norm: float = 1e5
    """Frobenius norm of one linear's scaled delta."""

    def over(self, base: BaseSpec) -> Self:
        """With room for the tensors of every expert of a base by itself."""
        experts = sum(i.experts * len(i.parts) for i in base.linears if i.role == "experts")
        return replace(
            self,
            tensors=self.tensors + 2 * experts,
            header_bytes=self.header_bytes + 2 * experts * _NAMED,
            pattern_work=self.pattern_work + experts * _LOOKED_AT,
        )


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds a remote source may take."""

    silence: float = 10.0
    """Until it connects, and between two pieces of an answer."""
    total: float = 600.0
    """For one adapter."""
