"""What an embedding multiplies its output by, as the model that has it does. Knows no weights."""

from typing import Any, cast

import torch
from torch import nn


def embed_scale(embedding: nn.Embedding) -> float:
    """The factor of the embedding's own forward, 1 where it has none.

    Families that scale keep the factor in a buffer, rounded to the dtype the model was loaded in,
    and round it to the table's; PEFT's delta takes the same buffer. A model without values has the
    unrounded one.
    """
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        if scale.is_meta:
            return float(cast(Any, embedding).scalar_embed_scale)
        scale = scale.to(cast("nn.Parameter", embedding.weight).dtype)
    return float(scale)
