"""How hard a model is to think, in OpenAI's words, and what a chat template makes of them."""

import re
from collections.abc import Collection

import jinja2
import jinja2.ext
import jinja2.meta

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
"""The values of `reasoning_effort`."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thinking on and off."""
_GIVEN = {"raise_exception", "strftime_now"}
"""Functions that transformers gives every template."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag, of which jinja2 knows nothing."""


def variables_read(template: str) -> frozenset[str]:
    """Names that a template reads and does not set; none for one that cannot be read."""
    environment = jinja2.Environment(  # noqa: S701 - only parsed
        extensions=[jinja2.ext.loopcontrols]
    )
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except jinja2.TemplateError:
        return frozenset()
    return (
        frozenset(jinja2.meta.find_undeclared_variables(tree)) - environment.globals.keys() - _GIVEN
    )


def variables_for(effort: str | None, names: Collection[str]) -> dict[str, str | bool]:
    """What a template that reads these names is given for an effort.

    Its own `reasoning_effort`, and a switch for thinking: on, or off for "none", which templates
    with a switch do not know as an effort.
    """
    if effort is None:
        return {}
    given: dict[str, str | bool] = {name: effort != "none" for name in _SWITCHES if name in names}
    if "reasoning_effort" in names and not (given and effort == "none"):
        given["reasoning_effort"] = effort
    return given
