"""Stacks of unquantised experts on a GPU where torch's grouped product waits for the host. Knows
weights and pairs; no routers, models or deltas."""

import torch

from fader_adapters.kernels.cuda import plain_expert_configs as configs
from fader_adapters.kernels.cuda.nf4 import options
from fader_adapters.kernels.cuda.nf4_expert_configs import most_tiles
from fader_adapters.kernels.cuda.plain_expert_kernels import plain_experts
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight


def waits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product asks the device how many pairs each expert has: beyond bf16
    on Hopper and data centres' Blackwell. Nothing that waits can be captured."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return dtype != torch.bfloat16 or not ((major, minor) == (9, 0) or major == 10)


class CudaStackWeight(StackWeight):
    """A StackWeight whose pairs are all multiplied in one launch; a pair's bits depend on the pair
    alone, and a call can be captured. Interpreted and compiled so far, never run on a GPU."""

    @classmethod
    def of(cls, weight: StackWeight) -> StackWeight:
        """The same weight, so multiplied where torch's own way waits."""
        if not waits(weight.source.device, weight.source.dtype):
            return weight
        return cls(weight.source, weight.bias, transposed=weight.transposed)

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        weight = self.values
        (experts, n, k), pairs = weight.shape, x.shape[0]
        x = x.to(weight.dtype)
        y = torch.empty(pairs, n, dtype=x.dtype, device=x.device)
        if not pairs:
            return y
        if x.stride(1) != 1:
            x = x.contiguous()
        config = configs.launch(pairs, experts, x.element_size())
        bias = None if self.bias is None else self.bias.data
        assert bias is None or bias.is_contiguous()
        grid = (-(-n // config.bn), most_tiles(pairs, experts, config.bm))
        plain_experts[grid](
            x,
            weight,
            y if bias is None else bias,
            routing.ends,
            y,
            experts=experts,
            n=n,
            k=k,
            x_stride=x.stride(0) if pairs > 1 else k,
            w_expert=weight.stride(0),
            w_row=weight.stride(1),
            w_column=weight.stride(2),
            **configs.constants(config, bias=bias is not None),
            **options(config.warps, config.stages),
        )
        return y
