"""How large the base's linears are, to say how much an adapter changes them."""

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
            site = next(s for s in self._installed.sites if linear in s.spec.linears)
            weight = site.kernel.base.dense(torch.float32)
            parts = torch.split(weight, list(site.spec.out_features))
            for index, part in zip(site.spec.linears, parts, strict=True):
                self._norms[index] = float(torch.linalg.vector_norm(part))
        return self._norms[linear]
