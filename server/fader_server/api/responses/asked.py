"""What an answer of /v1/responses needs of its request beside the call that it became."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """Facts of one request."""

    repeats: Mapping[str, bytes]
    """Fields that the answer repeats, as JSON."""
    namespaces: Mapping[str, str]
    """By function, where it was offered in one: calls name both."""
    streamed: bool
