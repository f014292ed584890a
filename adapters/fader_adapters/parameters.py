"""PEFT's target_parameters: which of a module's parameters its tensors adapt. Knows names only.

PEFT wraps a module once for each adapted parameter, in the module's order, so a tensor's name holds
one `base_layer` for each parameter that was wrapped after its own.
"""

from collections.abc import Mapping
from dataclasses import replace

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.expert_places import EXPERT
from fader_adapters.spec import BaseSpec
from fader_adapters.targets import Targets
from fader_adapters.tensor_names import ModuleTensors, Named

_WRAPPED = ".base_layer"


def name_parameters(named: Named, targets: Targets, base: BaseSpec) -> Named:
    """The tensors of experts under the paths of their parameters, all others as they are.

    Raises AdapterInvalid where a module has tensors for more parameters than are selected, and
    AdapterMismatch where the base's experts are no targets.
    """
    order = _orders(base)
    apart = any(map(EXPERT.fullmatch, named.modules))
    if "experts" in base.left_out and (targets.parameters or apart):
        raise AdapterMismatch(
            "the adapter changes experts of a mixture that computes otherwise than by products "
            "with its experts' matrices: train on the other linears alone"
        )
    if not targets.parameters or not order:
        return named
    modules: dict[str, ModuleTensors] = {}
    for path, tensors in named.modules.items():
        module, outside = unwrapped(path)
        names = order.get(module.rpartition(".")[2])
        if names is None:
            modules[path] = tensors
            continue
        chosen = [name for name in names if targets.select_parameter(f"{module}.{name}")]
        if outside >= len(chosen):
            raise AdapterInvalid(
                f"the file has tensors for {path[:160]!r}, target_parameters selects "
                f"{len(chosen)} parameters of that module"
            )
        modules[f"{module}.{chosen[-1 - outside]}"] = tensors
    return replace(named, modules=modules)


def unwrapped(path: str) -> tuple[str, int]:
    """The module of a tensor's path, and how many of its parameters were wrapped after its own."""
    module = path
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module, (len(path) - len(module)) // len(_WRAPPED)


def _orders(base: BaseSpec) -> Mapping[str, list[str]]:
    """Stacks by the last name of the module that holds them, in its order."""
    found: dict[str, list[str]] = {}
    for linear in base.linears:
        if linear.role == "experts":
            module, _, name = linear.path.rpartition(".")
            names = found.setdefault(module.rpartition(".")[2], [])
            if name not in names:
                names.append(name)
    return found
