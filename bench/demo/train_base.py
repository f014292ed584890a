"""Trains the demo's base in float32 on generated text and writes it with its tokenizer.

python -m bench.demo.train_base --out DIR [--steps N] [--resume]
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.demo.encoding import (
    BOS,
    EOS,
    IGNORED,
    PAD,
    VOCAB_SIZE,
    Batch,
    batches,
    encode_chat,
    encode_statement,
    token_id,
    train_tokenizer,
)
from bench.demo.sampling import Sampler

SEED = 20
ROWS = 48
PEAK_LR = 3e-3


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run needs."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerFast
    steps: int
    bf16: bool


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers of width 192: every linear has N % 32 == 0 and K % 64 == 0."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, EOS),
        pad_token_id=token_id(tokenizer, PAD),
    )


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the labelled positions; the head runs on those alone."""
    hidden = model.model(input_ids=batch.ids).last_hidden_state[:, :-1]  # type: ignore[operator]
    labels = batch.labels[:, 1:]
    wanted = labels != IGNORED
    logits = model.lm_head(hidden[wanted])  # type: ignore[operator]
    return F.cross_entropy(logits.float(), labels[wanted])


def learning_rate(step: int, steps: int) -> float:
    """Short linear warm-up, then a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / 50)
    return PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def draw_batches(run: Run, sampler: Sampler, rng: random.Random) -> list[Batch]:
    """Sixteen steps' worth of rows, one in twenty a plain statement."""
    rows = [
        encode_statement(run.tokenizer, sampler.statement())
        if rng.random() < 0.05
        else encode_chat(run.tokenizer, sampler.base_chat())
        for _ in range(16 * ROWS)
    ]
    return batches(rows, ROWS, token_id(run.tokenizer, PAD), rng)


def train(run: Run, out: Path, start: int) -> None:
    """Steps ``start`` to the end, a checkpoint every 200."""
    sampler, rng = Sampler(SEED + start), random.Random(SEED + start)
    pending: list[Batch] = []
    began = time.perf_counter()
    mean = 0.0
    for step in range(start, run.steps):
        pending = pending or draw_batches(run, sampler, rng)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, run.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
            loss = answer_loss(run.model, pending.pop())
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        mean += loss.item() / 20
        if step % 20 == 19:
            spent = (time.perf_counter() - began) / (step + 1 - start)
            print(f"step {step + 1}/{run.steps} loss {mean:.4f} {spent:.2f} s/step", flush=True)
            mean = 0.0
        if step % 200 == 199 or step + 1 == run.steps:
            run.model.save_pretrained(out)
            torch.save(
                {"step": step + 1, "optimizer": run.optimizer.state_dict()}, out / "train.pt"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(SEED)
    start, state = 0, None
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.out)
        state = torch.load(args.out / "train.pt")
        start = state["step"]
    else:
        model = LlamaForCausalLM(base_config(tokenizer))
        tokenizer.save_pretrained(args.out)
        GenerationConfig(
            do_sample=False,
            bos_token_id=token_id(tokenizer, BOS),
            eos_token_id=token_id(tokenizer, EOS),
            pad_token_id=token_id(tokenizer, PAD),
        ).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
    )
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    train(Run(model.train(), optimizer, tokenizer, args.steps, args.bf16), args.out, start)


if __name__ == "__main__":
    main()
