"""Runs a few tokens through a freshly loaded base, packed as the engine packs them, and compares
with the model's own attention on each sequence alone. Knows module trees; knows no cache.

What a model does across a step's tokens outside its attention (convolutions, recurrent states,
positions of its own counting) is found here, before it can answer anybody.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.errors import first_line
from fader_adapters.layers import SiteHead, SiteLinear
from fader_adapters.packed_weight import WeightRead
from fader_server.errors import ModelUnsupported
from fader_server.model import attention
from fader_server.model.callers import Callers, Heard
from fader_server.model.kv_cache import LayerShape

LENGTHS = (5, 6)
"""Tokens of the two sequences that share the packed forward."""
WANTED = (4, 5, 6, 10)
"""Packed tokens whose logits are compared: the first ends, the second begins right behind it."""
OWN, BESIDE = (1, 6), (0, 1, 5, 16)
"""Tokens of a sequence whose bits are compared, and of the one before it; 0: none."""
BOUND = {torch.float32: 0.01}
BOUND_ROUNDED = 0.15
"""Largest distance of logits over their own spread, in fp32 and in 16-bit floats; bf16 alone makes
0.011 of it on 8 layers and 0.023 on 22."""


class Aside(Protocol):
    """Layers of a model whose rows run alone in a forward that the others share."""

    @property
    def modules(self) -> Iterable[nn.Module]:
        """The layers, which see to it that a row's bits are its own."""
        ...

    @property
    def linears(self) -> Container[nn.Module]:
        """Those inside them."""
        ...

    def rows_of(self, counts: Sequence[int]) -> AbstractContextManager[None]:
        """New sequences of so many tokens share the next forward."""
        ...


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a packed forward showed."""

    layers: dict[nn.Module, LayerShape]
    """The shape of every attention layer's cache."""
    calls: dict[nn.Module, set[Heard]]
    """What the modules called, by their own code."""


def rehearse(
    model: PreTrainedModel, source: str, *, dtype: torch.dtype, aside: Aside | None = None
) -> Rehearsed:
    """Raises ModelUnsupported, in one line.

    `dtype`: of the activations; some models give logits of another. `aside`: the layers whose rows
    run alone.
    """
    callers = Callers(model, but=() if aside is None else aside.modules)
    ids = made_up(model, sum(LENGTHS))
    try:
        probe = attention.Probe(LENGTHS)
        with callers.listening():
            packed = _packed(model, ids, probe, WANTED, aside)
        if aside is None:
            _expect_layers(model, source, len(probe.shapes))
        with torch.inference_mode(), _as(model, "eager"):
            alone = [
                model(input_ids=part.unsqueeze(0), use_cache=False).logits[0]
                for part in torch.split(ids, list(LENGTHS))
            ]
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
    except Exception as error:  # a model whose forward wants something else than token ids
        raise ModelUnsupported(f"{source}: a first forward failed: {reason(error)}") from error
    found = distance(packed, torch.cat(alone)[list(WANTED)])
    bound = BOUND.get(dtype, BOUND_ROUNDED)
    if not found <= bound:
        raise ModelUnsupported(
            f"{source}: {type(model).__name__} does not give in a shared batch what it gives alone "
            f"(logits differ by {found:.2g} of their spread): it mixes tokens, or counts "
            "positions, outside its attention"
        )
    return Rehearsed(probe.shapes, callers.calls)


def first_logits(model: PreTrainedModel, *, packable: bool) -> torch.Tensor:
    """[1, tokens, vocab] of a sequence alone. `packable`: the model attends by Fader's function."""
    with torch.inference_mode(), _as(model, "eager") if packable else nullcontext():
        return model(input_ids=made_up(model, 2)[None], use_cache=False).logits


def same_bits(model: PreTrainedModel, aside: Aside) -> bool:
    """Whether a sequence has the same bits alone and behind others of any length."""
    return all(_same_bits(model, own, aside) for own in OWN)


def _same_bits(model: PreTrainedModel, own: int, aside: Aside) -> bool:
    ids = made_up(model, own + max(BESIDE))
    found: list[torch.Tensor] = []
    for before in BESIDE:
        probe = attention.Probe((before, own) if before else (own,))
        together = torch.cat([ids[own : own + before], ids[:own]])
        wanted = tuple(range(before, before + own))
        found.append(_packed(model, together, probe, wanted, aside))
    return all(torch.equal(found[0], other) for other in found[1:])


def made_up(model: PreTrainedModel, count: int) -> torch.Tensor:
    """[count] token ids, on the model's device."""
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    return torch.tensor([(7919 * i + 11) % vocab for i in range(count)], device=model.device)


def _packed(
    model: PreTrainedModel,
    ids: torch.Tensor,
    probe: attention.Probe,
    wanted: tuple[int, ...],
    aside: Aside | None,
) -> torch.Tensor:
    """[len(wanted), vocab] of the probe's sequences, one behind the other, in one forward."""
    inner = frozenset() if aside is None else aside.linears
    positions = [torch.arange(count, device=ids.device) for count in probe.lengths]
    with (
        torch.inference_mode(),
        _every_token(model, len(ids), inner),
        _as(model, attention.REHEARSAL),
        nullcontext() if aside is None else aside.rows_of(probe.lengths),
    ):
        return model(
            input_ids=ids.unsqueeze(0),
            position_ids=torch.cat(positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=ids.device),
            fader_step=probe,
        ).logits[0]


def _expect_layers(model: PreTrainedModel, source: str, found: int) -> None:
    text = model.config.get_text_config(decoder=True)
    aside = getattr(text, "cross_attention_layers", None) or ()  # to pictures: text skips them
    expected = text.num_hidden_layers - len(aside)
    if found != expected:
        raise ModelUnsupported(
            f"{source}: {found} of {expected} layers attend through transformers' "
            "AttentionInterface; Fader needs all of them"
        )


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest over the rows of ‖ours − theirs‖ / ‖theirs − mean‖; NaN where either is."""
    ours, theirs = ours.float(), theirs.float()
    spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((ours - theirs).norm(dim=-1) / spread.clamp(min=1e-20)).max())


@contextmanager
def _every_token(model: PreTrainedModel, tokens: int, but: Container[nn.Module]) -> Iterator[None]:
    """Refuse linears that see something else than all of the step's tokens: a delta has one row
    for each token of the step.
    """

    def hook(path: str) -> Any:  # noqa: ANN401  torch's own type
        def check(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen = args[0].numel() // args[0].shape[-1]
            if seen != tokens:
                raise ModelUnsupported(
                    f"{path} is given {seen} of a step's {tokens} tokens; Fader adapts linears "
                    "that see all of them"
                )

        return check

    handles = [
        module.register_forward_pre_hook(hook(path))
        for path, module in model.named_modules()
        if isinstance(module, SiteLinear) and not isinstance(module, SiteHead) and module not in but
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model attends by another function of transformers' registry."""
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


def reason(error: Exception) -> str:
    line = first_line(error)
    if isinstance(error, WeightRead):
        return f"the model reads a linear's weight by itself ({line}), and Fader keeps it packed"
    return line
