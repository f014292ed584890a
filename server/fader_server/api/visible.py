"""What exists for a caller: the adapters and recipes that its key may use. Decided here only.

Other names are never looked up, so nothing can tell them from names that do not exist.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

from fader_adapters.errors import AdapterNotFound, BlendInvalid
from fader_server.api.adapter_ports import AdapterInfo, Adapters, Lease
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.named_blends import Recipe, Recipes

Sees = Callable[[str], bool]
"""Whether an adapter or a recipe of this name exists for a caller, when there is one."""


def everything(name: str) -> bool:
    return True


class Known(Protocol):
    """Where names of adapters get their meaning: Adapters, or what a caller sees of them."""

    def get(self, ref: AdapterRef) -> AdapterInfo: ...

    async def lease(self, terms: Sequence[NamedTerm]) -> Lease: ...


class Visible:
    """The adapters and recipes of this server as one caller sees them."""

    def __init__(
        self, adapters: Adapters, recipes: Recipes, *, sees: Sees, tenant: str = ""
    ) -> None:
        self._adapters = adapters
        self._recipes = recipes
        self._sees = sees
        self._tenant = tenant

    def find(self, name: str) -> Recipe | None:
        """The recipe, as Recipes.find."""
        return self._recipes.find(name) if self._sees(name) else None

    def recipes(self) -> list[Recipe]:
        """By name."""
        return [recipe for recipe in self._recipes.list() if self._sees(recipe.name)]

    def adapters(self) -> list[AdapterInfo]:
        """In the order of Adapters.list."""
        return [info for info in self._adapters.list() if self._sees(info.name)]

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """As Adapters.get. Raises AdapterNotFound."""
        if not self._sees(ref.name):
            raise AdapterNotFound.of(ref.name)
        return self._adapters.get(ref)

    async def lease(self, terms: Sequence[NamedTerm]) -> Lease:
        """As Adapters.lease, terms of weight 0 included. Raises AdapterNotFound, AdapterError,
        Overloaded, TenantBusy."""
        seen = [term for term in terms if self._sees(term.ref.name)]
        if len(seen) == len(terms):
            return await self._adapters.lease(terms, tenant=self._tenant)
        if seen:  # beside a name that nothing has they would be loaded on demand, too
            with contextlib.suppress(BlendInvalid):
                (await self._adapters.lease(seen, tenant=self._tenant)).release()
        raise AdapterNotFound("an adapter of the blend is not loaded")

    def within(self, recipe: Recipe | None) -> Known:
        """Where terms are looked up. Those of a recipe were chosen by an administrator: who may
        use it may use them in it, whatever their names. None: terms of the caller's own.
        """
        if recipe is None:
            return self
        return Visible(self._adapters, self._recipes, sees=everything, tenant=self._tenant)
