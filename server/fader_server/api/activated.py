"""Which adapters of a call are activated by tokens of its prompts, and by which they are not."""

from collections.abc import Iterable

from fader_adapters.spec import Digest
from fader_server.api.adapter_ports import Lease
from fader_server.core import Request


def activated(lease: Lease) -> frozenset[Digest]:
    """Versions that apply from their invocation on."""
    return frozenset(v for v, data in lease.adapters.items() if data.spec.invocation)


def not_invoked(requests: Iterable[Request], lease: Lease) -> list[str]:
    """Names of those whose invocation a prompt lacks: they do not apply to it."""
    missed: set[Digest] = set()
    for request in requests:
        missed |= activated(lease) - {term.version for term in request.phases[-1].blend.terms}
    return [term.name for term in lease.terms if term.version in missed]
