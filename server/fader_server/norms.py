"""How large the base's linears are, to say how much an adapter changes them."""

import math
import threading

import torch

from fader_adapters.layers import Installed
from fader_adapters.parse import ParsedAdapter


class BaseNorms:
    """Frobenius norms of the base's linears, computed when first asked for and kept."""

    def __init__(self, installed: Installed) -> None:
        self._installed = installed
        self._norms: dict[int, float] = {}
        self._lock = threading.Lock()

    def relative(self, parsed: ParsedAdapter) -> float:
        """Largest ‖ΔW‖/‖W‖ over the adapter's linears whose W is not zero; else 0."""
        with self._lock:
            pairs = [
                (module.delta_norm, self._norm(delta.linear))
                for module, delta in zip(parsed.report.modules, parsed.spec.deltas, strict=True)
            ]
        return max((delta / norm for delta, norm in pairs if norm), default=0.0)

    def _norm(self, linear: int) -> float:
        if linear not in self._norms:
            parts = map(torch.linalg.vector_norm, self._installed.panels(linear))
            self._norms[linear] = math.hypot(*map(float, parts))
        return self._norms[linear]
