"""What a `model` string or a body stands for: the base, an adapter, a recipe or a blend.

Knows the grammar, the base's name and the recipes; the store decides whether an adapter exists.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterNotFound, AdapterTooLarge
from fader_server.api.adapter_ports import Lease
from fader_server.api.blends import AdapterRef, NamedTerm, read_blend
from fader_server.api.fields import Fields
from fader_server.api.named_blends import Recipe
from fader_server.api.visible import Known
from fader_server.errors import AdapterUnavailable, ModelNotFound, RecipeIncomplete, RequestInvalid
from fader_server.metrics import OTHER

_BASE, _BLEND = "base", "blend"
"""Labels of what has no name."""

FindRecipe = Callable[[str], Recipe | None]
"""Recipes.find, or Visible.find."""


@dataclass(frozen=True, slots=True)
class Target:
    """A resolved spelling: what to lease."""

    model: str
    """As the client spelled it; repeated in the answer."""
    terms: tuple[NamedTerm, ...]
    recipe: Recipe | None = None
    """Where the terms come from, when they have a name."""
    spelled: bool = False
    """The terms stood in the body."""


def resolve(
    model: str, terms: tuple[NamedTerm, ...] | None, *, base: str, recipes: FindRecipe
) -> Target:
    """`base`, `adapter`, `adapter@version`, `recipe`, the last three also behind `base:`; or
    `base` with a blend.

    Raises ModelNotFound for other spellings, RequestInvalid for a blend beside an adapter or with
    a recipe in it.
    """
    if model == base:
        refuse_recipes(terms or (), recipes)
        return Target(model, terms or (), spelled=terms is not None)
    name = model.removeprefix(base + ":")
    ref, recipe = AdapterRef.read(name), recipes(name)
    if ref is None:
        raise ModelNotFound("The requested model does not exist.")
    if terms is not None:
        raise RequestInvalid(
            "adapters needs model to be the base; put this adapter into adapters instead",
            param="adapters",
            code="blend_invalid",
        )
    if recipe is not None:
        return Target(model, recipe.terms, recipe)
    return Target(model, (NamedTerm(ref, 1.0),))


def read_target(fields: Fields, *, max_terms: int, recipes: FindRecipe) -> Target | None:
    """What a body outside generation names: a blend in `adapters`, or a name in `recipe`.

    None when it names neither. Problems with `recipe` are noted in `fields`. Raises RequestInvalid
    for a blend that is malformed, ModelNotFound for a recipe that is not there.
    """
    name, terms = fields.string("recipe", longest=128), read_blend(fields, max_terms)
    if not name:
        if terms is None:
            return None
        refuse_recipes(terms, recipes)
        return Target("", terms, spelled=True)
    if terms is not None:
        fields.refuse("recipe", "cannot stand beside adapters")
        return None
    recipe = recipes(name)
    if recipe is None:
        raise ModelNotFound("The requested recipe does not exist.")
    return Target(name, recipe.terms, recipe)


async def lease_target(target: Target, adapters: Known) -> Lease:
    """Resolve the names to versions and hold those, in one step; the caller releases the lease.

    `lease.blend` is what to compute, `lease.terms` are names with versions and weights. Raises
    ModelNotFound, RecipeIncomplete naming what is missing, AdapterUnavailable for what can no
    longer be loaded, and what else Adapters.lease raises.
    """
    try:
        return await adapters.lease(target.terms)
    except (AdapterInvalid, AdapterMismatch, AdapterTooLarge) as error:
        raise AdapterUnavailable(
            f"An adapter of this request cannot be loaded from its source: {error}"
        ) from error
    except AdapterNotFound:
        if target.recipe is not None:
            raise RecipeIncomplete(told_missing(target.recipe, adapters)) from None
        if target.spelled:
            missing = _not_loaded(target.terms, adapters)
            told = f"; not loaded: {missing}" if missing else ""
            raise ModelNotFound(f"An adapter of the blend does not exist{told}.") from None
        raise ModelNotFound(f"The model `{target.model}` does not exist.") from None


def version_of(ref: AdapterRef, adapters: Known) -> str | None:
    """The version a request would use now; None when there is none."""
    try:
        return adapters.get(ref).version
    except AdapterNotFound:
        return None


def told_missing(recipe: Recipe, adapters: Known) -> str:
    """One sentence for a client: which terms no loaded adapter answers to."""
    missing = _not_loaded(recipe.terms, adapters)
    return (
        f"The recipe `{recipe.name}` cannot be used: {missing or 'an adapter of it'} is not loaded."
    )


def _not_loaded(terms: tuple[NamedTerm, ...], adapters: Known) -> str:
    refs = [term.ref for term in terms]
    return ", ".join(str(ref) for ref in refs if version_of(ref, adapters) is None)


def refuse_recipes(terms: tuple[NamedTerm, ...], recipes: FindRecipe) -> None:
    """A blend is made of adapters. Raises RequestInvalid."""
    for term in terms:
        if recipes(term.ref.name) is not None:
            raise RequestInvalid(
                f"`{term.ref.name}` is a recipe; a blend names adapters: use the recipe as model, "
                "or its adapters here",
                param="adapters",
                code="blend_invalid",
            )


def blend_header(lease: Lease) -> str:
    """x-fader-blend: `tone@3fa9c1d2e4b5=0.7, domain@…=-0.2`, or `base`."""
    if not lease.terms:
        return "base"
    return ", ".join(
        f"{term.name}@{term.version[:12]}={exact(term.weight)}" for term in lease.terms
    )


def exact(weight: float) -> str:
    """The shortest spelling that reads back as the same number."""
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)


def label_of(target: Target, lease: Lease) -> str:
    """One word for logs and metrics: the recipe's or the adapter's name, `base`, or `blend`."""
    if target.recipe is not None:
        return _told_apart("recipe", target.recipe.name)
    if not lease.terms:
        return _BASE
    return _told_apart("adapter", lease.terms[0].name) if len(lease.terms) == 1 else _BLEND


def _told_apart(kind: str, name: str) -> str:
    """The name; `adapter:base` for one that is called as what is no adapter."""
    return f"{kind}:{name}" if name in (_BASE, _BLEND, OTHER) else name
