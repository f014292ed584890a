"""Layers that keep states of their own beside attention, computed for all rows of a step at once:
the model's own forward, where a backend's kernels stand for its functions over a sequence's tokens.

Knows modules by the functions that they call; what those compute `state_kernels` knows, where
states lie `state_slots`. Each layer proves on a few tokens that it computes what it did.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from fader_adapters.kernels.native import StateRows, Tape
from fader_adapters.kernels.states import StateMaker
from fader_server.core import Plan
from fader_server.errors import EngineFault, ModelUnsupported
from fader_server.model.mixers import found
from fader_server.model.products import SteadyProducts
from fader_server.model.rehearsal import distance
from fader_server.model.state_kernels import StateKernels
from fader_server.model.state_slots import NOBODY, SPARE, StateSlots
from fader_server.model.states import StateShape, new_cache
from fader_server.model.steady import within
from fader_server.model.twin import calls, with_functions

PIECES = ((6,), (1, 9), (1,), (5,))
"""Tokens of the first sequence, and of another beside it, step by step of the proof."""
KEPT = 16
"""Slots that keep states of prefixes also while all rows run."""
BOUND = {torch.float32: 1e-3}
BOUND_ROUNDED = 0.05
"""Largest distance of a layer's output over its spread, in fp32 and in 16-bit floats."""


class PackedStates:
    """Of one model. One thread at a time."""

    def __init__(self, model: PreTrainedModel, make: StateMaker, tape: Tape | None) -> None:
        """tape: of the native kernels, on a CPU that has them. Raises ModelUnsupported where a
        layer calls no function that is known."""
        self.rows: StateRows | None = None
        """Of the forward that runs now; None: it is none of the engine's, and keeps no states."""
        self._config, self._device = model.config, model.device
        self.slots = StateSlots()
        self._room = 0
        self._settled = False
        self._layers: list[_Layer] = []
        try:
            for module, cache in found(model):
                own = StateKernels(make, lambda: self.rows)
                self._layers.append(_Layer(module, cache, own, tape, self))
        except ModelUnsupported:
            self.end()
            raise
        if not self._layers:
            raise ModelUnsupported("no layer is known to keep states")
        self._have(8)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def modules(self) -> list[nn.Module]:
        """The layers."""
        return [layer.module for layer in self._layers]

    linears: frozenset[nn.Module] = frozenset()
    """Those that are not given all of a step's tokens: none."""

    @property
    def state(self) -> StateShape:
        """What a sequence takes, after a forward."""
        each = sum(layer.kernels.bytes_per_slot for layer in self._layers)
        return StateShape(per_token=0, fixed=2 * each)

    def end(self) -> None:
        """Leave the model as it was."""
        for layer in self._layers:
            layer.end()

    def reserve(self, rows: int) -> None:
        """Have room for so many sequences, so that no step waits for it; a CPU takes memory as it
        is written to. What of it no sequence needs keeps states of prefixes."""
        self.slots.most = max(self.slots.most, SPARE + 2 * rows + KEPT)
        self._have(max(self._room, self.slots.most))

    def settle(self) -> None:
        """States stay where they are from now on: steps are captured over them."""
        self._settled = True

    def places(self, plan: Plan) -> tuple[list[int], list[int]]:
        """Of each row the slot it goes on from and the one its state goes to, in which there is
        room now. Raises EngineFault when a state is not known, or there is no room."""
        places = self.slots.places(plan.rows)
        if self.slots.count > self._room:
            self._have(self.slots.count + self.slots.count // 2)
        return places

    def made_up(self, counts: Sequence[int]) -> StateRows:
        """Up to two rows of nobody's, from their beginning."""
        assert len(counts) <= SPARE
        return state_rows(
            counts, [NOBODY] * len(counts), list(range(len(counts))), device=self._device
        )

    def left(self, rows: StateRows) -> list[torch.Tensor]:
        """Copies of the states that rows have left."""
        return [part for layer in self._layers for part in layer.kernels.at(rows.to)]

    def computed(self, plan: Plan) -> None:
        """The step's states are there now."""
        self.slots.computed(plan.rows)

    @contextmanager
    def of(self, rows: StateRows) -> Iterator[None]:
        """The forward that runs inside goes on from these states."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None

    @contextmanager
    def rows_of(self, counts: Sequence[int]) -> Iterator[None]:
        """New sequences of so many tokens share the next forward."""
        with self.of(self.made_up(counts)):
            yield

    def prove(self, dtype: torch.dtype) -> None:
        """Compare each layer with its own code and cache. Raises ModelUnsupported."""
        bound = BOUND.get(dtype, BOUND_ROUNDED)
        with torch.inference_mode():
            for layer in self._layers:
                apart = layer.proof(self._config, dtype, self._device)
                if not apart <= bound:
                    raise ModelUnsupported(
                        f"{type(layer.module).__name__} does not give with other kernels what it "
                        f"gives (outputs differ by {apart:.2g} of their spread)"
                    )

    def _have(self, slots: int) -> None:
        if slots == self._room:
            return
        if self._settled:
            raise EngineFault(f"there is room for {self._room} states, and {slots} are needed")
        self._room = slots
        for layer in self._layers:
            layer.kernels.grow(slots)


class _Layer:
    """One of the modules; a function stands where its forward stood."""

    def __init__(
        self,
        module: nn.Module,
        cache: str,
        kernels: StateKernels,
        tape: Tape | None,
        owner: PackedStates,
    ) -> None:
        """cache: what it calls the cache it is given."""
        self.module = module
        self.kernels = kernels
        self._owner = owner
        self._cache = cache
        self._own: Callable[..., torch.Tensor] = module.forward
        own = self._own
        packed = within(SteadyProducts(tape), _with_functions(module, self.kernels))

        def forward(*args: object, **kwargs: object) -> torch.Tensor:
            if owner.rows is None:
                return own(*args, **kwargs)
            return packed(*args, **{**kwargs, cache: None})

        # a function, which a copy of the model may share, where a method would bring its owner
        setattr(module, "forward", forward)  # noqa: B010

    def end(self) -> None:
        setattr(self.module, "forward", self._own)  # noqa: B010

    def proof(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> float:
        """The largest distance of an output from that of the module's own code, by two sequences
        in pieces."""
        generator = torch.Generator().manual_seed(0)
        width = config.get_text_config(decoder=True).hidden_size
        caches: list[Cache] = [new_cache(config), new_cache(config)]
        apart, slot = 0.0, NOBODY
        for at, counts in enumerate(PIECES):
            given = [
                torch.randn(1, n, width, generator=generator).to(device, dtype) for n in counts
            ]
            expected = [
                self._own(x, **{self._cache: cache})
                for x, cache in zip(given, caches, strict=False)
            ]
            came_from = [slot, NOBODY][: len(counts)]
            slot = at % 2
            to = [slot, 2][: len(counts)]
            with self._owner.of(state_rows(counts, came_from, to, device=device)):
                output = self.module(torch.cat(given, dim=1))
            apart = max(apart, distance(output[0], torch.cat(expected, dim=1)[0]))
        return apart


def state_rows(
    counts: Sequence[int], came_from: list[int], to: list[int], *, device: torch.device
) -> StateRows:
    """The tensors of rows of so many tokens."""
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    given = (starts, came_from, to)
    return StateRows(*(torch.tensor(x, dtype=torch.int32, device=device) for x in given))


def _with_functions(module: nn.Module, kernels: StateKernels) -> Callable[..., torch.Tensor]:
    known = calls(module, "causal_conv1d_fn")
    twin = with_functions(module, kernels.functions) if known else None
    if twin is None:
        raise ModelUnsupported(f"{type(module).__name__} calls no function that is known")
    return twin
