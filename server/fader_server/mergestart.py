"""What the settings say about merging: the probe text, a lane at start, or the policy. No HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from fader_adapters.errors import AdapterError
from fader_server import demo
from fader_server.api.adapter_ports import Adapters
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.merge_ports import MergeOrder
from fader_server.api.named_blends import Recipes
from fader_server.api.ports import Tokenizer
from fader_server.api.resolve import Target, lease_target
from fader_server.api.traffic import Traffic
from fader_server.automerge import AutoMerge
from fader_server.config import ServeConfig
from fader_server.errors import ConfigInvalid, FaderError, RequestInvalid
from fader_server.launch import Background, Prepare
from fader_server.mergepolicy import Policy
from fader_server.merging import MergedLanes, Parts
from fader_server.model.loaded import LoadedBase
from fader_server.settings import AUTO, BlendTerm

PROBE_TOKENS = 256


@contextmanager
def open_merging(config: ServeConfig, parts: Parts) -> Iterator[MergedLanes]:
    """Without a lane so far; a merge under way ends with it."""
    lanes = MergedLanes(parts, traffic=Traffic() if config.merge == AUTO else None)
    try:
        yield lanes
    finally:
        lanes.close()


def policy_of(
    config: ServeConfig, lanes: MergedLanes, adapters: Adapters
) -> tuple[Background, ...]:
    """What --merge auto runs on the event loop."""
    if lanes.traffic is None:
        return ()
    policy = Policy(share=config.merge_share, seconds=config.merge_seconds)
    merger = AutoMerge(
        lanes,
        adapters,
        lanes.traffic,
        policy,
        order=_order(config),
        decided=lambda action: lanes.decisions.update([action]),
    )
    return (partial(merger.run, config.merge_seconds),)


def lane_of(config: ServeConfig, lanes: MergedLanes) -> Prepare | None:
    """Opens the lane that --merge names."""
    if config.merge is None or config.merge == AUTO:
        return None
    terms = config.merge

    async def open_lane(adapters: Adapters, recipes: Recipes) -> None:
        recipe = recipes.find(terms[0].name) if terms == (BlendTerm(terms[0].name, 1.0),) else None
        named = [_named(term.name, term.weight) for term in terms]
        target = Target("--merge", tuple(named) if recipe is None else recipe.terms, recipe, True)
        try:
            lease = await lease_target(target, adapters)
            await asyncio.to_thread(lanes.start_now, _order(config), lease)
        except (AdapterError, FaderError) as error:
            raise ConfigInvalid(f"--merge: {error}") from error

    return open_lane


def _order(config: ServeConfig) -> MergeOrder:
    return MergeOrder(config.merge_dtype, force=config.merge_force)


def probe_tokens(config: ServeConfig, tokenizer: Tokenizer, most: int) -> tuple[int, ...]:
    """At most `most` tokens of the --probe file, or of the demo's questions.

    Raises ConfigInvalid when the file cannot be read or holds too little.
    """
    most = min(most, PROBE_TOKENS)
    if config.probe is None:
        return tuple(_questions(tokenizer))[:most]
    try:
        text = config.probe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text in UTF-8"
        raise ConfigInvalid(f"--probe {config.probe}: {why}") from None
    tokens = tuple(tokenizer.encode_prompt(text[: most * 64]))[:most]
    if len(tokens) < 2:
        raise ConfigInvalid(f"--probe {config.probe}: expected text of a few sentences")
    return tokens


def room_to_keep(config: ServeConfig, base: LoadedBase) -> int:
    """Bytes that the plan leaves for the lane that --merge will want."""
    if config.merge is None:
        return 0
    if config.merge_dtype == "nf4":
        return base.installed.nbytes
    sites = (site.spec for site in base.installed.sites)
    weights = sum(site.in_features * sum(site.out_features) for site in sites)
    return weights * base.dtype.itemsize


def _questions(tokenizer: Tokenizer) -> list[int]:
    """The demo's questions as a chat where the base has a template, else as plain text."""
    with suppress(RequestInvalid):
        asked = [[{"role": "user", "content": question}] for question in demo.PROBE]
        return [token for question in asked for token in tokenizer.encode_chat(question)]
    return tokenizer.encode_prompt("\n".join(demo.PROBE))


def _named(name: str, weight: float) -> NamedTerm:
    ref = AdapterRef.read(name)
    if ref is None:
        raise ConfigInvalid(f"--merge: {name} is no adapter's name, nor name@version")
    return NamedTerm(ref, weight)
