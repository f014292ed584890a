"""How numbers of a forward depend on its size: linearly, as three sizes show. Knows no calls."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fader_server.model.recording import Unrepeatable


class Size(NamedTuple):
    """Of one forward."""

    tokens: int
    logits: int


SIZES = (Size(5, 2), Size(37, 2), Size(5, 3))
"""What is recorded: enough to know how everything depends on either number. Far apart, so that a
loop over some rows at a time is another one at another size."""


class Linear(NamedTuple):
    """at + per_token·tokens + per_logit·logits, int64 of any shape."""

    at: np.ndarray
    per_token: np.ndarray
    per_logit: np.ndarray

    def of(self, size: Size) -> np.ndarray:
        return self.at + self.per_token * size.tokens + self.per_logit * size.logits

    @property
    def fixed(self) -> bool:
        return not self.per_token.any() and not self.per_logit.any()

    @staticmethod
    def through(values: Sequence[Any]) -> "Linear":
        """Through what was seen at SIZES. Raises Unrepeatable where no line is."""
        shapes = {np.shape(value) for value in values}
        if len(shapes) > 1:
            raise Unrepeatable("a tensor has other dimensions at other sizes")
        first, longer, wider = (np.asarray(value, np.int64) for value in values)
        token, rest = np.divmod(longer - first, SIZES[1].tokens - SIZES[0].tokens)
        logit, other = np.divmod(wider - first, SIZES[2].logits - SIZES[0].logits)
        if rest.any() or other.any():
            raise Unrepeatable("something depends on the number of tokens, and not linearly")
        return Linear(first - token * SIZES[0].tokens - logit * SIZES[0].logits, token, logit)
