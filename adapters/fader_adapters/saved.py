"""Whole tables that PEFT saved beside an adapter, for modules_to_save or as copies of the base's:
where each one stands. Knows names and shapes; reads no values.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.header import TensorInfo
from fader_adapters.lora_config import LoraConfig
from fader_adapters.places import Place
from fader_adapters.spec import BaseSpec
from fader_adapters.tensor_names import Named
from fader_adapters.views import View

ENDS = ("embedding", "head")
"""What has rows of tokens."""


@dataclass(frozen=True, slots=True)
class SavedTable:
    """A whole table in the place of the base's embedding or output head."""

    place: Place
    infos: tuple[TensorInfo, ...]
    """[tokens, width] each, all of one content; no more tokens than the base has."""
    trained: bool
    """Named by modules_to_save; else a copy of the base's own, which may be trained as well."""


def check_saved(
    named: Named, config: LoraConfig, view: View, base: BaseSpec
) -> tuple[SavedTable, ...]:
    """The table of each end of the base that has one, as PEFT loads them.

    What modules_to_save names replaces that module alone, or both ends of a tied base with
    ensure_weight_tying. A copy is loaded into the base itself: into both ends of a tied one.
    Raises AdapterInvalid, AdapterMismatch.
    """
    ends = {place.path: place for place in view.places.values() if place.role in ENDS}
    tying = base.tied and config.ties_saved
    trained, copies = _sort(named, config, view, tying=tying)
    both = [info for infos in trained.values() for info in infos] if tying else []
    for path in ends:
        named_here = config.saves(view.their_path(path)) or config.saves(path)
        if path not in trained and (named_here or tying):
            raise AdapterInvalid(
                f"adapter_config.json: modules_to_save means {path!r}, the file has no weight for "
                "it: a partial adapter"
            )
    shared = [info for infos in copies.values() for info in infos] if base.tied else []
    found: list[SavedTable] = []
    for path, place in ends.items():
        mine = both or trained.get(path)
        infos = mine or shared or copies.get(path, ())
        if infos:
            _check_shapes(infos, place)
            found.append(SavedTable(place, tuple(infos), bool(mine)))
    return tuple(found)


def check_apart(tables: Collection[SavedTable], adapted: Mapping[str, str]) -> None:
    """What is trained whole has nothing else. `adapted`: what others have, by the base's path.
    Raises AdapterInvalid."""
    for table in tables:
        if table.trained and table.place.path in adapted:
            raise AdapterInvalid(
                f"adapter_config.json: modules_to_save means {table.place.path!r}, which has "
                f"{adapted[table.place.path]} as well; train the one or the other"
            )


def _sort(
    named: Named, config: LoraConfig, view: View, *, tying: bool
) -> tuple[dict[str, list[TensorInfo]], dict[str, list[TensorInfo]]]:
    """Tensors by the base's path: of what modules_to_save names, and copies of the base's own."""
    trained: dict[str, list[TensorInfo]] = {}
    copies: dict[str, list[TensorInfo]] = {}
    for path, info in (*named.whole.items(), *named.kept.items()):
        place = view.place(path)
        if place is None or place.role not in ENDS:
            raise _neither(path, info, place)
        there = trained if tying or config.saves(path) else copies
        if there is copies and info is named.kept.get(path):
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r} is a whole module, which modules_to_save of "
                "adapter_config.json does not name"
            )
        there.setdefault(place.path, []).append(info)
    for path, info in named.copies.items():
        place = view.place(path)
        if place is not None and place.role in ENDS:
            copies.setdefault(place.path, []).append(info)
        elif path not in named.modules:
            raise AdapterInvalid(f"tensor {info.name[:160]!r} belongs to no adapted module")
    return trained, copies


def _neither(path: str, info: TensorInfo, place: Place | None) -> AdapterInvalid:
    remedy = f"leave {path.rpartition('.')[2][:80]!r} out of modules_to_save"
    if place is not None:
        remedy += ", or turn what was trained of a linear into LoRA by `fader extract`"
    return AdapterInvalid(
        f"tensor {info.name[:160]!r} is a whole module of its own; of those only the base's "
        f"embedding and its output head can differ from request to request: {remedy}"
    )


def _check_shapes(infos: Collection[TensorInfo], place: Place) -> None:
    tokens, width = place.table
    for info in infos:
        if len(info.shape) == 2 and info.shape[1] == width and info.shape[0] > tokens:
            raise AdapterMismatch(
                f"tensor {info.name[:160]!r} has {info.shape[0]} tokens, the base {tokens}: its "
                f"vocabulary was enlarged. Enlarge the base's (resize_token_embeddings"
                f"({info.shape[0]}), the adapter's tokenizer beside it), save it, serve that"
            )
        if len(info.shape) != 2 or info.shape[1] != width:
            raise AdapterMismatch(
                f"tensor {info.name[:160]!r} has shape {info.shape}, {place.path!r} of the base "
                f"({tokens}, {width}): another base"
            )
