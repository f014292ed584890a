"""Computes logits only where they are wanted, in models that would give every token's.

Knows modules and their signatures; knows nothing of plans.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

KEEP = "logits_to_keep"
"""How models that know of it are told which tokens' logits are wanted."""


def keep_wanted(model: PreTrainedModel) -> None:
    """Give the output head no other tokens, where the model's own forward would not choose them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or KEEP in inspect.signature(model.forward).parameters:
        return
    wanted: torch.Tensor | None = None

    def note(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:  # noqa: ANN401
        nonlocal wanted
        wanted = given.pop(KEEP, None)
        return args, given

    def choose(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args if wanted is None else (args[0][:, wanted, :],)

    model.register_forward_pre_hook(note, with_kwargs=True)
    head.register_forward_pre_hook(choose)
