"""What a sampler computes over rows of logits on an NVIDIA GPU: by tensors, but for what would sort
or noise a whole vocabulary in many passes. Imports triton.
"""

import numpy as np
import torch
from torch import Tensor

from fader_adapters.kernels.cuda import draws as kernels
from fader_server.model.distribution import Draws, TorchDistributions
from fader_server.model.mass import Limits


class CudaDistributions(TorchDistributions):
    """Owned by the engine thread."""

    search = staticmethod(kernels.nucleus_edge)

    def __init__(self, vocab: int, device: torch.device) -> None:
        """Draws once from so many tokens: what is compiled, no request waits for."""
        limits = Limits(np.array([0, 1]), np.array([0.5, 1.0]), np.array([0.0, 0.5]))
        draws = Draws(np.ones(2, np.float32), limits, np.arange(2))
        self.draw(torch.zeros(2, vocab, device=device), torch.arange(2, device=device), draws)

    def winners(self, x: Tensor, heat: Tensor, keys: Tensor) -> Tensor:
        """As gumbel.winners, without its passes over [R, V]."""
        return kernels.winners(x, heat[:, 0], keys)
