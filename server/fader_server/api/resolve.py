"""What a `model` string stands for: the base, one adapter, or a blend named in the body.

Knows the grammar and the base's name; the store decides whether an adapter exists.
"""

from dataclasses import dataclass

from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.ports import Lease
from fader_server.errors import ModelNotFound, RequestInvalid


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved spelling: what to lease."""

    model: str
    """As the client spelled it; repeated in the answer."""
    terms: tuple[NamedTerm, ...]


def resolve(model: str, terms: tuple[NamedTerm, ...] | None, *, base: str) -> Target:
    """`base`, `adapter`, `base:adapter`, `adapter@version`; or `base` with a blend.

    Raises ModelNotFound for other spellings, RequestInvalid for a blend beside an adapter.
    """
    if model == base:
        return Target(model, terms or ())
    ref = AdapterRef.read(model.removeprefix(base + ":"))
    if ref is None:
        raise ModelNotFound("The requested model does not exist.")
    if terms is not None:
        raise RequestInvalid(
            "adapters needs model to be the base; put this adapter into adapters instead",
            param="adapters",
            code="blend_invalid",
        )
    return Target(model, (NamedTerm(ref, 1.0),))


def blend_header(lease: Lease) -> str:
    """x-fader-blend: `tone@3fa9c1d2e4b5=0.7, domain@…=-0.2`, or `base`."""
    if not lease.terms:
        return "base"
    return ", ".join(f"{term.name}@{term.version[:12]}={term.weight:g}" for term in lease.terms)


def adapter_label(lease: Lease) -> str:
    """One word for logs and metrics: the adapter's name, `base`, or `blend`."""
    if not lease.terms:
        return "base"
    return lease.terms[0].name if len(lease.terms) == 1 else "blend"
