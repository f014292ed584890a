"""A base that is ready to run. Imports no bitsandbytes: how it was read the loader knows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.native import Screen
from fader_adapters.layers import Installed
from fader_server.model.kv_cache import LayerShape, bytes_per_block
from fader_server.model.states import NO_STATE, StateShape

if TYPE_CHECKING:  # needs greenlet, which a base whose rows share a forward does not
    from fader_server.model.packed_states import PackedStates
    from fader_server.model.solo import OwnForward


@dataclass(frozen=True)
class LoadedBase:
    """A base ready to run: its model, its sites and the shapes its cache needs."""

    model: PreTrainedModel
    installed: Installed
    layers: dict[nn.Module, LayerShape]
    source: str
    dtype: torch.dtype
    device: torch.device
    backend: Backend
    max_positions: int
    vocab_size: int
    solo: "OwnForward | None" = None
    """How rows run that keep states of their own beside the engine's cache of keys and values."""
    packed_states: "PackedStates | None" = None
    """The layers that keep states, where all rows of a step go through them at once."""
    state: StateShape = NO_STATE
    """What a sequence's own cache takes there."""
    screen: Screen | None = None
    """Of an output layer whose largest outputs are all that greedy rows need."""

    @property
    def keeps_states(self) -> bool:
        """Whether a sequence is more than its keys and values."""
        return self.solo is not None or self.packed_states is not None

    def block_bytes(self, block_size: int) -> int:
        """What `block_size` tokens of a sequence take over all layers."""
        paged = bytes_per_block(self.layers, block_size=block_size, dtype=self.dtype)
        return max(1, paged + block_size * self.state.per_token)

    @property
    def nbytes(self) -> int:
        """Resident bytes of the base: NF4 weights, experts, embeddings, norms, the output layer and
        its screen."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        rest = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        screen = 0 if self.screen is None else self.screen.nbytes
        return self.installed.nbytes + sum(rest.values()) + screen
