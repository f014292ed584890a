"""What the modules of a model are told of the forward that runs now."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels.backend import BaseLinear, ExpertsWeight, Step

if TYPE_CHECKING:
    from fader_adapters.layers import Site


@dataclass(frozen=True, eq=False, slots=True)
class LaneWeights:
    """Other weights to run instead of the base's, without any delta; what is not here is shared."""

    bases: Mapping["Site", BaseLinear]
    table: torch.Tensor | None = None
    """[tokens, width] what the embedding gives for each token."""
    stacks: Mapping[int, ExpertsWeight] = field(default_factory=dict)
    """Experts and routers by their index in BaseSpec.linears."""

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        tables = [] if self.table is None else [self.table]
        plain = sum(tensor.nbytes for tensor in (*tables, *self.stacks.values()))
        return plain + sum(base.nbytes for base in self.bases.values())


class Recorder(Protocol):
    """Who records forwards."""

    @property
    def recording(self) -> bool:
        """Whether the forward that runs now is recorded."""
        ...

    def run(self, function: Callable[..., None], *args: torch.Tensor) -> None:
        """Run what changes its first argument by the step that runs; in a record it is one call."""
        ...


class _Nobody:
    recording = False

    def run(self, function: Callable[..., None], *args: torch.Tensor) -> None:
        function(*args)


NOBODY = _Nobody()


class StepState:
    """The work of the forward that runs now; every site of a model reads the same one."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.head: Callable[[torch.Size], Step | None] | None = None
        """The same for the rows the output head is given, by the shape of what it is given."""
        self.lane: LaneWeights | None = None
        """None: the base's own weights."""
        self.tokens: int | None = None
        """Of the forward that runs now; a linear that is given others is refused. None: unknown."""
        self.mixtures = False
        """Whether experts and routers, which are no linears, ask for the step, too."""
        self.recorder: Recorder = NOBODY
        """Who may record forwards, to run them again under other steps."""

    def at(self, x: torch.Tensor, *, head: bool) -> Step | None:
        """What a site that is called with `x` has to do."""
        if not head:
            return self.step
        return None if self.head is None else self.head(x.shape)

    def check_tokens(self, rows: int) -> None:
        """Raises BaseUnsupported for a module that is not given the tokens of the forward."""
        if self.tokens is not None and rows != self.tokens:
            raise BaseUnsupported(
                f"a linear was given {rows} of {self.tokens} tokens; adapters are for linears "
                "that see all of them, and not for pictures or sound beside a text"
            )
