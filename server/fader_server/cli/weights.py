"""Weights of terms, as commands take them."""

import math

from fader_server.errors import ConfigInvalid


def weight_in(text: str, form: str) -> float:
    """A finite number, from what stands behind the colon of `form`. Raises ConfigInvalid."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigInvalid(f"expected {form}, and {text!r} is no number")
    return found
