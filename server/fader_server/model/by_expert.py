"""Checkpoints in which every expert is an NF4 linear of its own, as transformers 4 wrote them: read
as packed stacks. Knows files and names; transformers does the rest.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fader_adapters.errors import AdapterError
from fader_adapters.kernels.nf4 import BLOCK
from fader_adapters.spec import LinearSpec
from fader_adapters.stacks import absmax_of
from fader_adapters.weightspace.base import Base, open_base
from fader_adapters.weightspace.quantised import COMPONENTS, STATE
from fader_adapters.weightspace.tensors import Checkpoint
from fader_server.errors import ModelUnsupported
from fader_server.model.values import unread

_OWN = re.compile(rf"\.experts\.\d+\..+\.weight\.{re.escape(STATE)}$", re.ASCII)
"""What lies beside a packed linear of one expert."""


def packed_by_expert(folder: Path) -> dict[str, Any] | None:
    """The values of such a checkpoint by the names under which transformers loads them, stacks
    packed and all else not read yet; None where no expert is an NF4 linear by itself.

    Raises ModelUnsupported where only some of the experts are.
    """
    try:
        if not any(map(_OWN.search, Checkpoint(folder).tensors)):
            return None
        base = open_base(folder)
        keys = {item: base.keys(item) for item in base.spec.linears if item.role == "experts"}
        own = {key for parts in keys.values() for key in parts}
        plain = next((key for key in sorted(own) if not base.is_packed(key)), None)
        if plain is not None:
            raise ModelUnsupported(f"{folder}: of its experts some are in NF4, {plain} is not")
        own |= {f"{key}.{part}" for key in own for part in COMPONENTS}
        values = unread(base.checkpoint, without=own)
        for linear in keys:
            values |= _stack(base, linear)
    except AdapterError as error:
        raise ModelUnsupported(str(error)) from error
    return values


def _stack(base: Base, linear: LinearSpec) -> Mapping[str, torch.Tensor]:
    shape = (linear.experts, linear.out_features)
    codes = torch.empty(*shape, linear.in_features // 2, dtype=torch.uint8)
    absmax = torch.empty(*shape, linear.in_features // BLOCK)
    for part in base.experts(linear):
        weight = base.packed(part.key).weight
        rows = slice(part.start, part.stop)
        codes[part.expert, rows] = weight.packed.view(weight.out_features, -1)
        absmax[part.expert, rows] = weight.absmax.view(weight.out_features, -1)
    return {linear.path: codes, absmax_of(linear.path): absmax}
