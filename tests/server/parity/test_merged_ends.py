"""Merged lanes of blends that adapt the output head or the embedding, tied or not."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from fader_adapters.lane import MergedLane, Merger
from fader_adapters.merged_site import LaneSpec
from fader_adapters.spec import Blend
from fader_server.model.fidelity import measure
from fader_server.model.probe import ProbeModel
from fader_server.model.views import BaseView, BlendView, LaneView
from tests.server.parity.test_families import AUTO_FIRST, BOUND, check, difference, prompts
from tests.server.parity.test_kinds import BACKENDS, Setting, asks, world
from tests.support.dense import DenseOracle
from tests.support.lanes import changes_of, merge, publish, weights_hash
from tests.support.many_families import MANY, write_many
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Answer, Ask, TinyWorld, greedy

BOTH = {"head": 0.5, "embedding": -0.8, "plain": 1.0}


FAMILIES = ["llama", "gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "gpt2"))]


@pytest.fixture(scope="module", params=FAMILIES)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("gemma3", tmp_path_factory.mktemp("rounded"), torch.bfloat16)


def opened(setting: Setting, backend="auto") -> TinyWorld:
    return world(setting.source, setting.adapters, setting.dtype, backend)


def groups(setting: Setting) -> Iterator[tuple[Oracle, Mapping[str, object]]]:
    for group in setting.groups:
        yield Oracle(setting.source, setting.dtype, group), group


def check_every_kind(setting: Setting, backend) -> None:
    found = opened(setting, backend)
    for oracle, group in groups(setting):
        for name in group:
            publish(found, merge(found, {name: 1.0}, form="bf16"))
            found.plans.clear()
            mixed = asks([{name: 1.0}], count=4)
            check(oracle, mixed, found.run(mixed), BOUND[setting.dtype])
            assert all(row.lane is not None for plan in found.plans for row in plan.rows)
            assert all(plan.terms.idle for plan in found.plans), "a merged row has no delta work"


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_a_lane_of_every_kind_equals_peft(exact: Setting, backend):
    check_every_kind(exact, backend)


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_a_lane_of_every_kind_equals_peft_in_bf16(rounded: Setting, backend):
    check_every_kind(rounded, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lane_of_both_ends_equals_dense_mathematics(exact: Setting, backend):
    found = opened(exact, backend)
    publish(found, merge(found, BOTH, form="bf16"))
    mixed = asks([BOTH])
    answers = found.run(mixed)
    oracle = DenseOracle(exact.source, exact.adapters)
    check(oracle, mixed, answers, BOUND[torch.float32])
    for name in BOTH:
        other = Ask(mixed[3].prompt, BOTH | {name: 0.1}, mixed[3].params)
        assert difference(oracle, other, answers[3], 10.0) > 10 * BOUND[torch.float32], name


@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_head_and_table_keep_the_dtype_of_the_bases_in_either_form(rounded: Setting, form):
    found = opened(rounded)
    changes = changes_of(found, BOTH)
    spec = LaneSpec(changes.blend, form, "keep")
    base, installed = found.base, found.base.installed
    merger = Merger(installed, base.backend, changes, spec, dtype=base.dtype, device=base.device)
    told: list[int] = []
    lane = merger.run(told.append, lambda: None)
    assert told == sorted(told)
    assert told[-1] == merger.weights
    assert installed.head is not None
    assert lane.weights.bases[installed.head].plain_dtype == torch.bfloat16
    assert lane.weights.table is not None
    assert lane.weights.table.dtype == torch.bfloat16
    assert 0.9 * merger.need.lane <= lane.weights.nbytes <= merger.need.lane
    assert [loss.path for loss in lane.losses] == [
        installed.spec.linears[i].path for i in sorted(changes.linears())
    ]
    assert all(0 <= loss.relative_error < 0.1 for loss in _ends(found, lane))


def _ends(found: TinyWorld, lane: MergedLane):
    roles = {linear.path: linear.role for linear in found.base.installed.spec.linears}
    ends = [loss for loss in lane.losses if roles[loss.path] != "linear"]
    assert len(ends) == 2
    return ends


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_adapted_leaves_the_base(exact: Setting, backend):
    found = opened(exact, backend)
    installed = found.base.installed
    before = weights_hash(installed)
    head = merge(found, {"head": 1.0}, form="nf4").weights
    assert (set(head.bases), head.table) == ({installed.head}, None)
    table = merge(found, {"embedding": 1.0}, form="nf4").weights
    assert not table.bases
    assert table.table is not None
    assert weights_hash(installed) == before
    found.base.model.get_output_embeddings().weight.data.view(-1)[0] += 1
    assert weights_hash(installed) != before


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "opt" else pytest.mark.slow) for f in sorted(MANY)]
)
def test_a_lane_of_every_linear_and_both_ends_in_many_families(family: str, tmp_path: Path):
    base = write_many(*MANY[family], tmp_path / "base")
    found = TinyWorld(base)
    linears = found.base.installed.spec.linears
    mixture = ("experts", "router")
    others = [item.role for item in linears if not item.inside and item.role not in mixture]
    assert others == ["embedding", "head"]
    experts = any("experts" in name for name, _ in found.base.model.named_modules())
    # PEFT turns the names of an MLP of experts into parameters, which are no linears
    paths = [
        item.path
        for item in linears
        if item.role not in mixture and not (experts and ".mlp" in item.path)
    ]
    targets = "|".join(path.replace(".", "[.]") for path in paths)
    made = write_adapter(
        base, tmp_path / "a", rank=4, seed=1, target_modules=f"(.*[.])?({targets})"
    )
    found.load("a", made)
    mixed = asks([{"a": 0.8}], count=4)
    delta = found.run(mixed)
    publish(found, merge(found, {"a": 0.8}, form="bf16"))
    lane = found.run(mixed)
    assert _farthest(delta, lane) < BOUND[torch.float32]
    publish(found, merge(found, {"a": 0.7}, form="bf16"), stands_for=_blend(found, {"a": 0.8}))
    assert _farthest(delta, found.run(mixed)) > 10 * BOUND[torch.float32]
    publish(found, merge(found, {"a": 0.8}, form="nf4"))
    again = [_facts(found.run(mixed)) for _ in range(3)]  # recorded, compared, replayed
    assert again[0] == again[1] == again[2]


def _blend(found: TinyWorld, blend: Mapping[str, float]) -> Blend:
    return changes_of(found, blend).blend


def _farthest(one: list[Answer], other: list[Answer]) -> float:
    """Largest difference of a prompt's logprobs."""
    pairs = [
        (x.logprob, y.logprob)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
    ]
    return max(abs(x - y) for x, y in pairs)


def _facts(answers: list[Answer]) -> list[object]:
    return [(a.tokens, a.logprobs, a.finish) for a in answers]


def _others() -> list[Ask]:
    blends: list[Mapping[str, float]] = [{}, {"embedding": 1.0}, {"head": 1.0, "dora": 0.4}]
    return [Ask(p, blends[i % 3], greedy(8)) for i, p in enumerate(prompts(6))]


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_others_are_bitwise_the_same_beside_a_lane_that_changes_the_ends(rounded, backend):
    plain = opened(rounded, backend).run(_others() + asks([BOTH]))
    found = opened(rounded, backend)
    lane = publish(found, merge(found, BOTH, form="nf4"))
    seen = []
    for _ in range(3):  # recorded, compared, replayed
        answers = found.run(_others() + asks([BOTH]))
        assert _facts(answers[:6]) == _facts(plain[:6])
        seen.append(_facts(answers[6:]))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != _facts(plain[6:]), "the lane was not used"
    steps = [{row.lane for row in plan.rows} for plan in found.plans]
    assert {None, lane.lane} in steps, "no step ran both kinds"
    found.scheduler.lanes.replace(None)
    assert _facts(found.run(_others() + asks([BOTH]))) == _facts(plain)


def test_steps_of_a_lane_that_changes_the_ends_are_replayed(rounded: Setting):
    found = opened(rounded)
    lane = publish(found, merge(found, BOTH, form="bf16"))
    for _ in range(3):
        found.run([Ask(prompt, BOTH, greedy(6)) for prompt in prompts(6)])
    assert 6 in found.runner._lanes[lane.lane].replays.decode._trusted


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_probe_sees_what_blend_and_lane_do(exact: Setting, backend):
    found = opened(exact, backend)
    changes = changes_of(found, BOTH)
    lane = merge(found, BOTH, form="bf16")
    tokens = prompts(6)[5]
    oracle = DenseOracle(exact.source, exact.adapters)
    wanted = [oracle.logits(tokens, blend) for blend in (BOTH, BOTH, {})]
    probe = ProbeModel(found.base, lambda: None)
    views = [BlendView(changes, probe.device), LaneView(lane), BaseView()]
    chunks = zip(*probe.logits(tokens, views), strict=True)
    for given, expected in zip(map(torch.cat, chunks), wanted, strict=True):
        assert float((given - expected).abs().max()) < BOUND[torch.float32]
    assert float((wanted[0] - wanted[2]).abs().max()) > 100 * BOUND[torch.float32]
    found_loss = measure(probe, tokens, changes, lane)
    assert found_loss.kl < 1e-6 < 1e-3 < found_loss.base_kl
    half = merge(found, {name: weight / 2 for name, weight in BOTH.items()}, form="bf16")
    assert measure(probe, tokens, changes, half).kl > 1e-4
