"""Many families against transformers + PEFT on the same NF4 base, over hundreds of tokens."""

from pathlib import Path

import pytest
import torch

from fader_server.engine.limits import Limits
from tests.server.parity.test_families import BOUND, check, difference
from tests.support.families import VOCAB
from tests.support.many_families import MANY, write_many
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

QUICK = frozenset({"cohere2", "deepseek-v3", "gpt-oss", "mixtral", "opt", "phi3-longrope"})
BLENDS = [{}, {"r8": 1.0}, {"r16": 1.0}, {"r8": 0.7, "r16": -0.4}]
LENGTHS = (300, 40, 130, 20, 7, 330, 64, 250)
ANSWER = 8
WITHOUT_OUT = frozenset(
    {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # by PEFT's own list
    | {"zamba2"}  # whose fp32 sums, with such deltas too, lie at the bound (1.03e-4)
)


def asks(longest: int) -> list[Ask]:
    """Prompts past every window, and past original lengths where the base goes on."""
    g = torch.Generator().manual_seed(5)
    lengths = [min(length, longest - ANSWER) for length in LENGTHS]
    return [
        Ask(
            torch.randint(3, VOCAB, (length,), generator=g).tolist(),
            BLENDS[i % len(BLENDS)],
            greedy(ANSWER, prompt_logprobs=0),
        )
        for i, length in enumerate(lengths)
    ]


def adapters(base: Path, folder: Path, world: TinyWorld) -> dict[str, Path]:
    """PEFT's own, over every linear that PEFT lets one adapt.

    It turns the names of a mixture's MLPs into experts' parameters, which are no linears, looks for
    those beside a decoder, and refuses the last linear of layers of the Mamba kind, in families
    that it lists.
    """
    model = world.base.model
    experts = any("experts" in name for name, _ in model.named_modules())
    inside = {id(module) for module in model.get_decoder().modules()}
    left_out = [".mlp.", ".mlps.", ".feed_forward."] if experts else []
    if model.config.model_type in WITHOUT_OUT:
        left_out += [".mamba.out_proj", ".mixer.out_proj"]
    paths = [
        item.path
        for item in world.base.installed.spec.linears
        if item.role == "linear"
        and not any(name in item.path for name in left_out)
        and (not experts or id(model.get_submodule(item.path)) in inside)
    ]
    targets = "|".join(path.replace(".", "[.]") for path in paths)
    return {
        name: write_adapter(
            base, folder / name, rank=rank, seed=rank, target_modules=f"(.*[.])?({targets})"
        )
        for name, rank in (("r8", 8), ("r16", 16))
    }


def equals_peft(base: Path, folder: Path, world: TinyWorld) -> None:
    """Mixed batches of two adapters over `world`'s base against PEFT; a wrong weight is noticed."""
    given = adapters(base, folder, world)
    for name, path in given.items():
        world.load(name, path)
    oracle = Oracle(base, torch.float32, given)
    questions = asks(world.base.max_positions)
    answers = world.run(questions)
    check(oracle, questions, answers, BOUND[torch.float32])
    other = Ask(questions[1].prompt, {"r8": 0.8}, questions[1].params)
    assert difference(oracle, other, answers[1], 1.0) > 10 * BOUND[torch.float32]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(MANY)],
)
def test_mixed_batch_past_windows_and_original_lengths_equals_peft(family: str, tmp_path: Path):
    base = write_many(*MANY[family], tmp_path / "base")
    world = TinyWorld(base, limits=Limits(max_rows=32, max_step_tokens=288, max_model_len=512))
    equals_peft(base, tmp_path, world)
