"""The delta of one site in one step: whole, or in two halves around the base's product."""

import torch

from fader_adapters.kernels.cuda import lora_calls as calls
from fader_adapters.kernels.cuda.lora_step import DeltaSite, LoraStep, PhaseLaunch


def delta(
    y: torch.Tensor,
    x: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    bias: torch.Tensor | None = None,
) -> None:
    """y[t] += Σᵢ γ[t,i]·s[slotᵢ,m]·(x[t]·A[slotᵢ,m]ᵀ)·B[slotᵢ,m], two launches a piece.

    Where the step has vectors, y ← y + G∘(y − bias) + Σᵢ γ·s·biasB, G = Σᵢ γ·gain, comes first.
    y     [T, Σ out of the members], written in place; rows without terms keep their bits
    x     [T, in], y's dtype and the arena's; both with unit column stride
    bias  [Σ out], the base's own inside y, contiguous, any float dtype
    T is at least step.tokens; the rows past it (a bucket's padding) are neither read nor written.
    Capturable when step.bucket is not None. Allocates nothing.
    """
    for launch in step.launches:
        calls.shrink(x, site, step, launch)
        _add(y, site, step, launch, bias)


def joined(
    planes: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    bias: torch.Tensor | None,
) -> None:
    """`shrink` and `join` of a step in several pieces, which share the scratch."""
    for launch in step.launches:
        calls.shrink(x, site, step, launch)
        _join(planes, out, site, step, launch, bias)


def shrink(x: torch.Tensor, site: DeltaSite, step: LoraStep) -> None:
    """The half of `delta` that needs x alone: `add` or `join` follows before the next site's.

    For steps of one piece: those of several share the scratch, and run by `delta` or `joined`.
    """
    (launch,) = step.launches
    calls.shrink(x, site, step, launch)


def add(y: torch.Tensor, site: DeltaSite, step: LoraStep, bias: torch.Tensor | None) -> None:
    """The other half of `delta`, into a finished result."""
    (launch,) = step.launches
    _add(y, site, step, launch, bias)


def join(
    planes: torch.Tensor,
    out: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    bias: torch.Tensor | None,
) -> None:
    """The other half of `delta`, into a result that still lies in planes, with their sum.

    planes  [P, T, Σ out of the members] float32, of a fused product without bias; overwritten
    out     [T, Σ out] contiguous, written: rows without terms, and those of a bucket's padding,
            with the bits that `nf4.add_planes` gives
    bias    [Σ out], the base's own, contiguous
    Only for a step that `covers`.
    """
    (launch,) = step.launches
    _join(planes, out, site, step, launch, bias)


def _join(
    planes: torch.Tensor,
    out: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    launch: PhaseLaunch,
    bias: torch.Tensor | None,
) -> None:
    assert step.covers
    assert planes.is_contiguous()
    assert out.is_contiguous()
    assert planes.shape[1:] == out.shape
    assert out.dtype == step.arena.dtype
    if step.vectors:
        calls.vectors(planes, site, step, launch, None)
    calls.join(planes, out, site, step, launch, bias)


def lookup_delta(y: torch.Tensor, ids: torch.Tensor, site: DeltaSite, step: LoraStep) -> None:
    """y[t] += y[t]∘G + Σᵢ γ[t,i]·s[slotᵢ]·A[slotᵢ][:, ids[t]]ᵀ·B[slotᵢ], as `delta` for one-hot x.

    ids  [T] int64, below the site's in_features; the site's `shrink` must not be split
    """
    assert ids.shape[0] == y.shape[0]
    for launch in step.launches:
        calls.pick(ids, site, step, launch)
        _add(y, site, step, launch, None)


def _add(
    y: torch.Tensor,
    site: DeltaSite,
    step: LoraStep,
    launch: PhaseLaunch,
    bias: torch.Tensor | None,
) -> None:
    assert y.shape[0] >= step.tokens
    assert y.shape[1] == site.out_features
    assert y.stride(1) == 1
    assert y.dtype == step.arena.dtype
    if step.vectors:
        calls.vectors(y[None], site, step, launch, bias)
    calls.expand(y, site, step, launch)
