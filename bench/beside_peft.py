"""Fader's engine beside PEFT on one NF4 base: a mixture with adapters of its experts, a hybrid.

Without HTTP, the ways in turn, prompts included. Fader runs another adapter for each row, and so
does PEFT but where experts are adapted; of a mixture there is also Fader with experts in NF4
("packed"). No figure unless both give the same logprobs in fp32 first. Each side has its threads as
it would: Fader's as its server sets them, PEFT torch's.

    python -m bench.beside_peft mixture|hybrid [--rounds 5] [--json FILE]
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bench.make_model import write_tokenizer
from bench.step_rig import Rig, read_adapters
from fader_adapters.kernels.backend import Backend, choose
from fader_server.bench.machine import machine_facts
from fader_server.bench.stats import spread
from fader_server.model.device import set_threads
from fader_server.model.loaded import LoadedBase
from fader_server.model.loader import load_base
from fader_server.model.writing import quantize
from fader_server.verification import verify


@dataclass(frozen=True)
class Family:
    """What is timed."""

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    shape: dict[str, int]
    mixed: bool
    """Whether PEFT runs another adapter for each row of a batch; else one for all of them."""


FAMILIES = {
    "mixture": Family(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "vocab_size": 8192, "hidden_size": 512, "moe_intermediate_size": 256,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        },
        mixed=False,
    ),
    "hybrid": Family(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        {
            "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 64, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
        mixed=True,
    ),
}  # fmt: skip
"""Adapters of a mixture change its experts; three of four layers of a hybrid keep states."""
RANK = 8
ROWS = 8
PROMPT, ANSWER = 64, 48
CPU = torch.device("cpu")


def write(family: Family, folder: Path) -> tuple[Path, dict[str, Path]]:
    """A random base in bf16 and adapters over all that PEFT takes for linear, experts included."""
    torch.manual_seed(0)
    model = family.model(family.config.from_dict(family.shape)).bfloat16()
    base, adapters = folder / "base", folder / "adapters"
    model.save_pretrained(base)
    write_tokenizer(base, family.shape["vocab_size"])
    found: dict[str, Path] = {}
    for number in range(ROWS):
        plain = AutoModelForCausalLM.from_pretrained(base)
        peft = get_peft_model(plain, LoraConfig(r=RANK, target_modules="all-linear"))
        torch.manual_seed(number)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        found[f"a{number}"] = adapters / f"a{number}"
        peft.save_pretrained(str(found[f"a{number}"]))
    return base, found


def check(base: Path, adapters: Mapping[str, Path]) -> float:
    """The largest difference of a logprob in fp32; ends the program when rounding does not explain
    it."""
    verified = verify(str(base), dict(list(adapters.items())[:2]), dtype=torch.float32)
    if not verified.ok:
        sys.exit(f"Fader and PEFT differ, so there is nothing to compare: {verified.findings}")
    return max(finding.difference for finding in verified.findings)


def prompts(rows: int, vocab: int) -> torch.Tensor:
    """[rows, PROMPT]"""
    g = torch.Generator().manual_seed(7)
    return torch.randint(3, vocab, (rows, PROMPT), generator=g)


def fader(rig: Rig, ids: torch.Tensor) -> Callable[[], None]:
    """Answer prompts [rows, PROMPT]; who was in first gets some tokens more, which do not count."""
    given, rows = [tuple(row) for row in ids.tolist()], len(ids)

    def run() -> None:
        rig.fill(given, max_tokens=2 * ANSWER)
        rig.prefill(rows)
        rig.steps(ANSWER - 1)
        rig.empty()

    return run


def generated(
    model: PeftModel, ids: torch.Tensor, *, adapted: bool, names: list[str] | None
) -> Callable[[], None]:
    """The same by PEFT's `generate`; names: of each row's adapter, where it takes such."""
    exactly: dict[str, Any] = {
        "min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "do_sample": False
    }  # fmt: skip
    if adapted and names is not None:
        exactly["adapter_names"] = names

    def run() -> None:
        with torch.inference_mode():
            if adapted:
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **exactly)
                return
            with model.disable_adapter():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **exactly)

    return run


@dataclass(frozen=True)
class Way:
    """What is timed."""

    rows: int
    run: Callable[[], None]
    backend: Backend | None
    """None: PEFT's."""


def opened(family: Family, base: Path, threads: int) -> dict[str, LoadedBase]:
    """Fader's bases by the name of their side."""
    found: dict[str, LoadedBase] = {}
    for side in ("fader", "packed") if "num_experts" in family.shape else ("fader",):
        backend = choose(CPU, torch.bfloat16, "native")
        set_threads(threads, backend)
        found[side] = load_base(
            str(base),
            dtype=torch.bfloat16,
            device=CPU,
            backend=backend,
            quantize_experts=side == "packed",
        )
    return found


def ways(
    family: Family, base: Path, adapters: Mapping[str, Path], bases: Mapping[str, LoadedBase]
) -> dict[str, Way]:
    """What is timed, by name."""
    folder = next(iter(adapters.values())).parent
    own = {side: read_adapters(folder, loaded, ROWS) for side, loaded in bases.items()}
    quantised = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    first, *others = adapters
    peft = PeftModel.from_pretrained(quantised, adapters[first], adapter_name=first)
    for name in others if family.mixed else ():
        peft.load_adapter(str(adapters[name]), name)
    peft.eval()
    found: dict[str, Way] = {}
    length = PROMPT + 2 * ANSWER
    for rows in (1, ROWS):
        ids = prompts(rows, family.shape["vocab_size"])
        names = list(adapters)[:rows] if family.mixed else None
        for what in ("base", "adapters"):
            for side, loaded in bases.items():
                worn = own[side][:rows] if what == "adapters" else []
                rig = Rig(loaded, worn, rows=rows, length=length)
                found[f"{side}, {what}, {rows}"] = Way(rows, fader(rig, ids), loaded.backend)
            other = generated(peft, ids, adapted=what == "adapters", names=names)
            found[f"peft, {what}, {rows}"] = Way(rows, other, None)
    return found


def tokens_per_second(way: Way, threads: int) -> float:
    """Of the output."""
    if way.backend is None:
        torch.set_num_threads(threads)
    else:
        set_threads(threads, way.backend)
    begin = time.perf_counter()
    way.run()
    return way.rows * ANSWER / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # PEFT's patterns for experts
    with tempfile.TemporaryDirectory() as folder:
        family = FAMILIES[args.family]
        base, adapters = write(family, Path(folder))
        difference = check(base, adapters)
        bases = opened(family, base, args.threads)
        if "packed" in bases:
            quantize(str(base), Path(folder) / "packed", device=CPU, experts=True)
            difference = max(difference, check(Path(folder) / "packed", adapters))
        timed = ways(family, base, adapters, bases)
        rates: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(args.rounds + 1):
            for name, way in timed.items():
                rate = tokens_per_second(way, args.threads)
                if number:  # the first is for caches and recordings
                    rates[name].append(rate)
    document = {
        "command": [Path(sys.executable).name, "-m", "bench.beside_peft", *sys.argv[1:]],
        "machine": machine_facts() | {"torch": torch.__version__, "threads": args.threads},
        "family": args.family,
        "shape": family.shape | {"rank": RANK, "prompt": PROMPT, "answer": ANSWER},
        "parity": {"largest_logprob_difference_fp32": difference},
        "base_bytes": {side: loaded.nbytes for side, loaded in bases.items()},
        "output_tokens_per_second": {name: asdict(spread(own)) for name, own in rates.items()},
    }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    for name, own in rates.items():
        told = spread(own)
        print(f"{name:24} {told.median:8.1f} tokens/s ({told.low:.1f} … {told.high:.1f})")


if __name__ == "__main__":
    main()
