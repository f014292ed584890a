"""Rounds the trained base to NF4 as shipped, and reads the rounded weights back as floats.

python -m bench.demo.quantise --dense DIR --out DIR [--settle N]

Rounding touches the linears only; ``--settle`` then trains embeddings and norms, which stay in
bfloat16, for N steps against the rounded linears.
"""

import argparse
import random
import shutil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from bench.demo.encoding import PAD, batches, encode_chat, token_id
from bench.demo.sampling import Sampler
from bench.demo.train_base import ROWS, SEED, answer_loss


def nf4_config() -> BitsAndBytesConfig:
    """NF4, block 64, double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def dequantised(nf4: PreTrainedModel) -> LlamaForCausalLM:
    """A float32 model holding exactly the NF4 weights. ``nf4`` must not have run a forward."""
    settings = nf4.config.to_dict()
    del settings["quantization_config"]
    config = LlamaConfig.from_dict(settings | {"dtype": torch.float32})
    dense = LlamaForCausalLM(config)
    state = {k: v for k, v in nf4.state_dict().items() if k in dense.state_dict()}
    for name, module in nf4.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            assert isinstance(weight, Params4bit)
            state[f"{name}.weight"] = dequantize_4bit(weight.data, weight.quant_state)
    dense.load_state_dict({k: v.float() for k, v in state.items()})
    return dense.eval()


def load_dequantised(folder: Path) -> LlamaForCausalLM:
    """The float32 twin of an NF4 checkpoint on disk."""
    nf4 = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    return dequantised(nf4)


def settle(model: LlamaForCausalLM, dense_folder: Path, steps: int) -> None:
    """Trains embeddings and norms in place, linears frozen, learning rate falling to 0."""
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    sampler, rng = Sampler(SEED + 999_983), random.Random(SEED)
    linears = {id(m.weight) for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in linears)
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    pending = []
    for step in range(steps):
        if not pending:
            rows = [encode_chat(tokenizer, sampler.base_chat()) for _ in range(16 * ROWS)]
            pending = batches(rows, ROWS, token_id(tokenizer, PAD), rng)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = answer_loss(model, pending.pop())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            print(f"settle {step}/{steps} loss {loss.item():.4f}", flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settle", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    nf4 = AutoModelForCausalLM.from_pretrained(
        args.dense,
        quantization_config=nf4_config(),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    nf4.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(args.dense / name, args.out / name)
    if args.settle:
        model = dequantised(nf4)
        settle(model, args.dense, args.settle)
        file = args.out / "model.safetensors"
        stored = load_file(file)
        trained = model.state_dict()
        settled = {
            name: trained[name].to(tensor.dtype)
            if name in trained and tensor.shape == trained[name].shape
            else tensor
            for name, tensor in stored.items()
        }
        save_file(settled, file, metadata={"format": "pt"})
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
