"""Recipes: blends with a name. What one is, and what the API needs of the book that keeps them.

Knows the terms as they were spelled, not which adapters exist.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fader_server.api.blends import NamedTerm


@dataclass(frozen=True)
class Recipe:
    """A named blend. Versions in its terms are whole: 64 digits, or None to follow the name."""

    name: str
    terms: tuple[NamedTerm, ...]
    created: int
    """Unix seconds of the change that made it what it is."""

    @cached_property
    def digest(self) -> str:
        """sha256 over every term's name, version and exact weight; their order does not count."""
        state = hashlib.sha256(b"fader-recipe-1")
        for term in sorted(self.terms, key=lambda term: str(term.ref)):
            state.update(f"{term.ref}\0".encode() + struct.pack("<d", term.weight))
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Written:
    """What a change of a recipe did."""

    recipe: Recipe
    created: bool
    """The name was free before."""


class Recipes(Protocol):
    """The recipes of this server. Belongs to the event loop."""

    def find(self, name: str) -> Recipe | None: ...

    def get(self, name: str) -> Recipe:
        """Raises RecipeNotFound."""
        ...

    def list(self) -> Sequence[Recipe]:
        """All of them by name."""
        ...

    async def put(
        self, name: str, terms: Sequence[NamedTerm], *, if_digest: str | None = None
    ) -> Written:
        """Write a recipe down: durable and in force when this returns.

        `if_digest`: only from this digest (12 or more digits), "" for a free name. Adapters that
        may be loaded on demand are loaded. Raises AdapterError as a lease does, RequestInvalid,
        NameReserved, RecipeConflict.
        """
        ...

    async def delete(self, name: str, *, if_digest: str | None = None) -> None:
        """Raises RecipeNotFound, RecipeConflict."""
        ...
