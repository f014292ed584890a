"""`fader adapters`: the adapters and recipes of a running server, over its HTTP routes."""

from typing import Annotated, Any

import typer

from fader_server.cli.connected import Session, connected
from fader_server.cli.weights import weight_in
from fader_server.errors import ConfigInvalid

Json = dict[str, Any]
Name = Annotated[str, typer.Argument(help="Name of the adapter.", metavar="NAME")]
Source = Annotated[
    str,
    typer.Argument(
        help="As the server sees it: a folder under its --adapter-dir, org/name[@revision] of "
        "the Hub, or a URL.",
        metavar="SOURCE",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, branch or tag of a Hub source.", metavar="REV")
]
Sha256 = Annotated[
    str | None, typer.Option("--sha256", help="Refuse any other version.", metavar="HEX")
]
RecipeName = Annotated[str, typer.Argument(help="Name of the recipe.", metavar="NAME")]
IfDigest = Annotated[
    str | None,
    typer.Option(help="Only if the recipe is at this digest, 12 or more digits.", metavar="HEX"),
]

adapters_app = typer.Typer(
    help="The adapters and recipes of a running server.", rich_markup_mode=None
)
recipe_app = typer.Typer(help="Recipes: blends with a name.", rich_markup_mode=None)


@adapters_app.command("list")
@connected
def list_(run: Session) -> None:
    """Every adapter, with its version, size and tier."""
    reports = run.client.adapters()
    heads = ("NAME", "VERSION", "RANK", "LINEARS", "SIZE", "TIER", "LEASES", "PINNED", "EARLIER")
    run.table(reports, heads, [_row(report) for report in reports])


@adapters_app.command()
@connected
def show(
    run: Session,
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.", metavar="NAME")],
) -> None:
    """One adapter's health report."""
    report = run.client.adapter(name)
    shown = {key: _shown(value) for key, value in report.items() if key != "object"}
    run.facts(report, shown | {"bytes": size(report.get("bytes"))})


@adapters_app.command()
@connected
def load(
    run: Session,
    name: Name,
    source: Source,
    revision: Revision = None,
    sha256: Sha256 = None,
    pin: Annotated[bool, typer.Option("--pin", help="Never unload it to make room.")] = False,
) -> None:
    """Load an adapter under a name that is free."""
    order = {"source": source, "revision": revision, "sha256": sha256, "if_version": ""}
    with run.patiently(f"loading {name}"):
        report = run.client.load(name, order | {"pin": pin or None})
    run.tell(report, f"{name} is loaded: {_told(report)}")


@adapters_app.command()
@connected
def swap(
    run: Session,
    name: Name,
    source: Source,
    revision: Revision = None,
    sha256: Sha256 = None,
    if_version: Annotated[
        str | None,
        typer.Option(
            help="Only from this version, 12 or more digits. Default: the one it has now.",
            metavar="HEX",
        ),
    ] = None,
) -> None:
    """Move a name to another version; running requests finish on theirs."""
    with run.patiently(f"swapping {name}"):
        before = run.client.adapter(name)
        order = {
            "source": source,
            "revision": revision,
            "sha256": sha256,
            "if_version": if_version or before["version"],
        }
        report = run.client.load(name, order)
    run.tell(report, f"{name} was at {_short(before)}, now: {_told(report)}")


@adapters_app.command()
@connected
def unload(run: Session, name: Name) -> None:
    """Forget a name; running requests finish."""
    answer = run.client.unload(name)
    recipes = ", ".join(answer.get("recipes", ()))
    run.tell(answer, f"{name} is unloaded" + (recipes and f"; recipes that miss it: {recipes}"))


@adapters_app.command()
@connected
def pin(run: Session, name: Name) -> None:
    """Keep an adapter when room is needed."""
    run.tell(run.client.pin(name, pinned=True), f"{name} is pinned")


@adapters_app.command()
@connected
def unpin(run: Session, name: Name) -> None:
    """Let an adapter go when room is needed."""
    run.tell(run.client.pin(name, pinned=False), f"{name} is not pinned")


@recipe_app.command("list")
@connected
def list_recipes(run: Session) -> None:
    """Every recipe."""
    recipes = run.client.recipes()
    rows = [
        (recipe["name"], _short(recipe), _terms(recipe), ", ".join(recipe["missing"]) or "-")
        for recipe in recipes
    ]
    run.table(recipes, ("NAME", "DIGEST", "ADAPTERS", "MISSING"), rows)


@recipe_app.command("show", short_help="A recipe's terms and the versions they mean now.")
@connected
def show_recipe(run: Session, name: RecipeName) -> None:
    """A recipe's terms, the versions a request would use now, and what is missing."""
    recipe = run.client.recipe(name)
    terms = {
        f"  {_cut(term['name'])}": f"{term['weight']!r}  at {(term['version'] or 'nothing')[:12]}"
        for term in recipe["adapters"]
    }
    run.facts(recipe, {"name": recipe["name"], "digest": recipe["digest"], **terms})


@recipe_app.command("set")
@connected
def set_recipe(
    run: Session,
    name: RecipeName,
    terms: Annotated[
        list[str],
        typer.Argument(
            help="Adapters with weights: tone:0.7 domain@3fa9c1d2e4b5:-0.2; a version keeps the "
            "recipe at it, without one it follows the name.",
            metavar="NAME[@VERSION][:WEIGHT]...",
        ),
    ],
    if_digest: IfDigest = None,
    new: Annotated[bool, typer.Option("--new", help="Only if the name is free.")] = False,
) -> None:
    """Write a recipe, new or in place of the one that is there."""
    if new and if_digest is not None:
        raise ConfigInvalid("--new and --if-digest exclude each other")
    weights = read_terms(terms)
    with run.patiently(f"writing {name}"):
        recipe = run.client.set_recipe(name, weights, if_digest="" if new else if_digest)
    run.tell(recipe, f"{name} is at {_short(recipe)}: {_terms(recipe)}")


@recipe_app.command("delete")
@connected
def delete_recipe(run: Session, name: RecipeName, if_digest: IfDigest = None) -> None:
    """Forget a recipe; running requests finish."""
    run.tell(run.client.delete_recipe(name, if_digest=if_digest), f"{name} is deleted")


adapters_app.add_typer(recipe_app, name="recipe")


def read_terms(terms: list[str]) -> dict[str, float]:
    """`NAME[@VERSION][:WEIGHT]` of every term; without a weight it is 1. Raises ConfigInvalid."""
    found: dict[str, float] = {}
    for term in terms:
        name, colon, weight = term.partition(":")
        if name in found:
            raise ConfigInvalid(f"{name} stands twice; add its weights")
        found[name] = weight_in(weight, "NAME:WEIGHT") if colon else 1.0
    return found


def size(count: object) -> str:
    """Bytes for a person: 1536 is 1.5 KiB."""
    if not isinstance(count, int):
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


def _row(report: Json) -> tuple[object, ...]:
    return (
        report["name"],
        _short(report),
        report["rank"],
        report["modules"],
        size(report["bytes"]),
        report["tier"],
        report["leases"],
        "yes" if report["pinned"] else "-",
        ", ".join(version[:12] for version in report["retired"]) or "-",
    )


def _told(report: Json) -> str:
    return (
        f"version {_short(report)}, rank {report['rank']}, {report['modules']} linears, "
        f"{size(report['bytes'])}"
    )


def _short(report: Json) -> str:
    return str(report.get("version") or report.get("digest"))[:12]


def _terms(recipe: Json) -> str:
    return " ".join(f"{_cut(term['name'])}:{term['weight']!r}" for term in recipe["adapters"])


def _cut(ref: str) -> str:
    name, at, version = ref.partition("@")
    return name + at + version[:12]


def _shown(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else value
