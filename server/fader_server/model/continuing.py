"""Selective scans that go on from the state in a cache. transformers' own begin every chunk of
tokens anew: with a cache they serve prompts at once and single tokens, and nothing between.

Knows that function by name and signature; knows no family.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fader_server.model.mixers import found
from fader_server.model.twin import calls, with_functions

SCAN = "mamba_selective_scan"


def continue_scans(model: nn.Module) -> None:
    """Let layers that call such a scan give for a sequence in chunks what they give at once."""
    for module, cache in found(model):
        if calls(module, SCAN):
            setattr(module, "forward", _continuing(module, cache))  # noqa: B010


def _continuing(module: nn.Module, name: str) -> Callable[..., Any]:
    """name: what its forward calls the cache."""
    own, layer = module.forward, cast(int, module.layer_idx)

    def forward(*args: object, **kwargs: object) -> object:
        cache = cast(Any, kwargs.get(name))
        state = None if cache is None else cache.get_recurrent_state(layer, state_idx=0)
        if state is None:
            return own(*args, **kwargs)
        twin = with_functions(module, {SCAN: partial(_scan, state)})
        assert twin is not None
        return twin(*args, **kwargs)

    return forward


def _scan(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_selective_scan` from `state` [n, channels, keys]: x, dt and z [n, channels, T], A
    [channels, keys], B and C [n, keys, T] → [n, channels, T], and the state behind it."""
    dtype = hidden_states.dtype
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    outputs: list[Tensor] = []
    for t in range(hidden_states.shape[-1]):
        step = dt[:, :, t, None]
        given = (step * hidden_states[:, :, t, None]).float() * B[:, None, :, t].float()
        state = torch.exp(A * step) * state + given
        outputs.append((state.to(dtype) @ C[:, :, t, None]).squeeze(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + hidden_states * D[:, None]
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y
