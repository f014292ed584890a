"""Merged lanes in a TinyWorld: made and published as the server does, without its threads."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fader_adapters.aside import Aside
from fader_adapters.changes import Changes
from fader_adapters.lane import MergedLane, Merger
from fader_adapters.layers import Installed
from fader_adapters.leases import AdapterRef
from fader_adapters.merged_site import LaneSpec
from fader_adapters.rounding import Rounding
from fader_adapters.spec import Blend
from fader_adapters.weightspace.plan import Form
from fader_server.core import Lane
from tests.support.world import TinyWorld


def changes_of(world: TinyWorld, blend: Mapping[str, float]) -> Changes:
    refs = [AdapterRef(name, None, gamma) for name, gamma in blend.items()]
    with world.store.acquire(refs) as lease:
        return Changes(lease.blend, lease.adapters, world.base.installed.spec)


def merge(
    world: TinyWorld, blend: Mapping[str, float], *, form: Form, rounding: Rounding = "keep"
) -> MergedLane:
    changes = changes_of(world, blend)
    merger = Merger(
        world.base.installed,
        world.base.backend,
        changes,
        LaneSpec(changes.blend, form, rounding),
        dtype=world.base.dtype,
        device=world.base.device,
    )
    with Aside(world.base.device)():
        return merger.run(lambda done: None, lambda: None)


@dataclass
class Opened:
    """A published lane."""

    lane: Lane
    gone: list[object] = field(default_factory=list)


def publish(world: TinyWorld, merged: MergedLane, *, stands_for: Blend | None = None) -> Opened:
    """`stands_for`: whose requests run in it, if not those of the blend it was made of."""
    opened = Opened(Lane((stands_for or merged.spec.blend).digest, merged.spec.key))
    world.runner.add_lane(opened.lane, merged.weights)

    def gone() -> None:
        opened.gone.append(world.runner.drop_lane(opened.lane))

    world.scheduler.lanes.replace(opened.lane, gone)
    return opened


def weights_hash(installed: Installed) -> str:
    """sha256 of every base weight as it lies in memory."""
    state = hashlib.sha256()
    for site in installed.every_site:
        base = site.kernel.base
        panels = getattr(base, "panels", None)
        tensors = (
            [panels.panels, *([panels.scales] if hasattr(panels, "scales") else [])]
            if panels is not None
            else [base.weight.packed, base.weight.absmax]
            if hasattr(base.weight, "packed")
            else [base.weight]
        )
        for tensor in tensors:
            state.update(_bytes(tensor))
    for stack in installed.stacks.values():
        rows = stack.spec.experts * stack.spec.out_features
        state.update(_bytes(stack.weight.rows(0, rows)))
    if installed.table is not None:
        state.update(_bytes(installed.table.dense(torch.float32)))
    return state.hexdigest()


def _bytes(tensor: torch.Tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
