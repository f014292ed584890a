"""The book of recipes: named blends, what they claim of the adapters, and their compare-and-swap.

Belongs to the event loop. Knows no HTTP and no file.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from fader_adapters.claims import Claims
from fader_adapters.errors import NameReserved
from fader_adapters.spec import ADAPTER_NAME, DIGEST_PREFIX, Digest
from fader_server.api.adapter_ports import Adapters
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.named_blends import Recipe, Written
from fader_server.api.resolve import refuse_recipes, version_of
from fader_server.errors import ConfigInvalid, RecipeConflict, RecipeNotFound, RequestInvalid

Save = Callable[[Mapping[str, Recipe]], Awaitable[None]]
"""Makes the recipes durable; what it returns is awaited before a change is answered."""


def claims_of(recipes: Iterable[Recipe], *names: str) -> Claims:
    """The names of recipes, and others beside them, and the versions that the recipes name."""
    claimed, versions = set(names), set[tuple[str, Digest]]()
    for recipe in recipes:
        claimed.add(recipe.name)
        refs = [term.ref for term in recipe.terms]
        versions.update((ref.name, Digest(ref.version)) for ref in refs if ref.version is not None)
    return Claims(frozenset(claimed), frozenset(versions))


class RecipeBook:
    """Implements the API's Recipes over the server's adapters."""

    def __init__(
        self,
        adapters: Adapters,
        *,
        base: str,
        most: int,
        recipes: Sequence[Recipe] = (),
        save: Save = lambda recipes: asyncio.sleep(0),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`base`: its name, claimed from now on; `most`: recipes at one time; `recipes`: those
        there are. Raises ConfigInvalid when one of them has the name of the base, NameReserved
        when an adapter has it.
        """
        if any(recipe.name == base for recipe in recipes):
            raise ConfigInvalid(
                f"--served-model-name {base}: a recipe in --state-dir has this name; give another"
            )
        self._adapters = adapters
        self._base = base
        self._most = most
        self._save = save
        self._clock = clock
        self._recipes: dict[str, Recipe] = {}
        self._set({recipe.name: recipe for recipe in recipes})

    def find(self, name: str) -> Recipe | None:
        return self._recipes.get(name)

    def get(self, name: str) -> Recipe:
        recipe = self._recipes.get(name)
        if recipe is None:
            raise RecipeNotFound(f"there is no recipe {name[:128]!r}")
        return recipe

    def list(self) -> Sequence[Recipe]:
        return [self._recipes[name] for name in sorted(self._recipes)]

    async def put(
        self, name: str, terms: Sequence[NamedTerm], *, if_digest: str | None = None
    ) -> Written:
        self._check(name, if_digest)
        refuse_recipes(tuple(terms), self.find)
        lease = await self._adapters.lease(terms)
        try:  # from here to the claim without a pause: what was checked is what is claimed
            self._check(name, if_digest)
            fixed = tuple(self._fix(term) for term in terms)
            recipe = Recipe(name, fixed, int(self._clock()))
            created = name not in self._recipes
            self._set({**self._recipes, name: recipe})
        finally:
            lease.release()
        await self._save(self._recipes)
        return Written(recipe, created)

    async def delete(self, name: str, *, if_digest: str | None = None) -> None:
        self.get(name)
        self._check_digest(name, if_digest)
        self._set({key: recipe for key, recipe in self._recipes.items() if key != name})
        await self._save(self._recipes)

    def _set(self, recipes: dict[str, Recipe]) -> None:
        self._adapters.claim(claims_of(recipes.values(), self._base))
        self._recipes = recipes

    def _fix(self, term: NamedTerm) -> NamedTerm:
        """The term with its version in full. Raises AdapterNotFound."""
        if term.ref.version is None:
            return term
        version = self._adapters.get(term.ref).version
        return replace(term, ref=AdapterRef(term.ref.name, version))

    def _check(self, name: str, if_digest: str | None) -> None:
        if not ADAPTER_NAME.fullmatch(name):
            raise RequestInvalid(
                "a recipe's name has letters, digits and . _ - only, 128 at most", param="name"
            )
        if name == self._base:
            raise NameReserved("the base has this name; choose another for the recipe")
        if version_of(AdapterRef(name), self._adapters) is not None:
            raise NameReserved(f"{name!r} is the name of an adapter; choose another")
        self._check_digest(name, if_digest)
        if name not in self._recipes and len(self._recipes) >= self._most:
            raise RequestInvalid(
                f"there are {self._most} recipes, the limit; delete one first", code="recipe_limit"
            )

    def _check_digest(self, name: str, expected: str | None) -> None:
        """Raises RecipeConflict."""
        recipe = self._recipes.get(name)
        current = recipe.digest if recipe is not None else ""
        if expected is None or expected == current:
            return
        if DIGEST_PREFIX.fullmatch(expected) and current.startswith(expected):
            return
        at = f"it is at {current}" if current else "there is none"
        wanted = f"at {expected[:64]}" if expected else "to be free"
        raise RecipeConflict(f"expected the recipe {name!r} {wanted}, {at}; read it again")
