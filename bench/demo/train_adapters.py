"""Trains the demo's LoRA adapters with PEFT on the NF4-rounded base.

python -m bench.demo.train_adapters --base DIR --out DIR [--only NAME ...]
"""

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer

from bench.demo.encoding import PAD, Batch, batches, encode_chat, token_id
from bench.demo.quantise import load_dequantised
from bench.demo.sampling import Sampler
from bench.demo.train_base import SEED, answer_loss

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
ROWS = 32
PEAK_LR = 2e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is made."""

    rank: int
    alpha: int
    modules: tuple[str, ...]
    steps: int
    rslora: bool = False
    weakest: float = 1.0
    """Each step runs at a γ drawn between this and 1, so that the effect has margin in blends."""


RECIPES = {
    "shout": Recipe(4, 8, ALL_LINEARS, 200),
    "json": Recipe(4, 8, ALL_LINEARS, 200),
    "polite": Recipe(4, 8, ("q_proj", "v_proj", "o_proj"), 200),
    "german": Recipe(8, 16, ALL_LINEARS, 250),
    "pirate": Recipe(4, 2, ALL_LINEARS, 100, rslora=True),
    "directory": Recipe(16, 16, ALL_LINEARS, 900, weakest=0.6),
}


def train_adapter(name: str, base: Path, out: Path) -> None:
    """One adapter, alone on a fresh copy of the base, saved as PEFT saves it."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        load_dequantised(base),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.modules),
            use_rslora=recipe.rslora,
            base_model_name_or_path="fader-demo",
        ),
    )
    assert isinstance(model, PeftModel)
    sampler, rng = Sampler(SEED + len(name) * 1009), random.Random(SEED)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, weight_decay=0.0)
    pending: list[Batch] = []
    began = time.perf_counter()
    for step in range(recipe.steps):
        if not pending:
            rows = [encode_chat(tokenizer, sampler.adapter_chat(name)) for _ in range(16 * ROWS)]
            pending = batches(rows, ROWS, token_id(tokenizer, PAD), rng)
        optimizer.param_groups[0]["lr"] = (
            PEAK_LR * min(1.0, (step + 1) / 20) * (1 - step / recipe.steps)
        )
        set_dose(model, rng.uniform(recipe.weakest, 1.0))
        loss = answer_loss(model.get_base_model(), pending.pop())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 50 == 49:
            spent = time.perf_counter() - began
            print(
                f"{name} {step + 1}/{recipe.steps} loss {loss.item():.4f} {spent:.0f} s", flush=True
            )
    save(model, name, out)


def set_dose(model: PeftModel, gamma: float) -> None:
    """Runs the adapter at γ times its own scale."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", gamma)


def save(model: PeftModel, name: str, out: Path) -> None:
    """Only the two files a server reads."""
    model.peft_config["default"].base_model_name_or_path = "fader-demo"
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # a set has no order of its own
    file.write_text(f"{json.dumps(config, indent=2, sort_keys=True)}\n", encoding="utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=RECIPES)
    args = parser.parse_args()
    for name in args.only or RECIPES:
        train_adapter(name, args.base, args.out)


if __name__ == "__main__":
    main()
