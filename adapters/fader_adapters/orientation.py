"""Which way round the tensors of an adapted parameter stand. Knows shapes and versions of PEFT.

PEFT's `target_parameters` gives A the width of one of a weight's dimensions and B that of the
other. Which of them is x's changed: until 0.18 the dimension order alone decided, 0.19.0 asked the
module and turned the wrong ones, and from 0.19.1 on stacks of experts are right. A Conv1D's weight
is turned in all of them. Where a weight is square, only that tells.
"""

import re
from collections.abc import Mapping

from fader_adapters.errors import AdapterInvalid
from fader_adapters.lora_config import LoraConfig
from fader_adapters.places import Place
from fader_adapters.spec import BaseSpec
from fader_adapters.tensor_names import ModuleTensors

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})")
_UNTOLD = (0, 19, 0)
"""What it wrote depends on the transformers beside it."""


def turned(
    modules: Mapping[str, ModuleTensors],
    places: Mapping[str, Place],
    config: LoraConfig,
    base: BaseSpec,
) -> frozenset[str]:
    """Paths of those whose delta is AᵀBᵀ, not BA. Raises AdapterInvalid where nothing tells."""
    found: set[str] = set()
    square: dict[str, bool] = {}
    told: dict[bool, bool] = {}
    for path, tensors in modules.items():
        place = places[path]
        parameter = f"{path}.weight" if place.module else path
        if place.role == "embedding" or not config.targets.select_parameter(parameter):
            continue
        stored_turned = base.linears[place.spans[0].linear].conv1d
        stack = not place.module
        if place.in_features != place.out_features:
            given = (tensors.a.shape[-1], tensors.b.shape[0])
            other_way = given == (place.out_features, place.in_features)
            found |= {path} if other_way else set()
            if stack:
                told.setdefault(stored_turned, other_way)
        elif stack:
            square[path] = stored_turned
        elif stored_turned:
            found.add(path)
    for path, stored_turned in square.items():
        if stored_turned not in told:
            told[stored_turned] = _by_version(config, stored_turned)
        found |= {path} if told[stored_turned] else set()
    return frozenset(found)


def _by_version(config: LoraConfig, stored_turned: bool) -> bool:
    match = _VERSION.match(config.peft_version or "")
    version = tuple(map(int, match.groups())) if match else None
    if version == _UNTOLD and stored_turned:
        raise AdapterInvalid(
            "adapter_config.json: PEFT 0.19.0 wrote square experts either way round, and this "
            "adapter has no other by which to tell; train it with another version"
        )
    return version is not None and version <= _UNTOLD and not stored_turned
