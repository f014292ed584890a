"""Writes a random Llama-shaped checkpoint, its tokenizer, and random PEFT adapters for it.

For benchmarks of any server: the files are what Hugging Face tools write. Knows no server.

    python -m bench.make_model 57m OUT --adapters 16
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

STD = 0.02
RANKS = (8, 16)
DELTA = 0.25
"""‖ΔW‖/‖W‖ of every adapter: large enough that greedy answers differ from the base's."""
SPECIALS = ("<unk>", "<s>", "</s>")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes, in elements."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    context: int = 4096
    tied: bool = False
    """The output layer is the embedding."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name inside a layer → (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


PRESETS = {
    "tiny": Shape(64, 2, 4, 2, 128, 512, context=1024),
    "57m": Shape(512, 8, 8, 4, 1536, 32000),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936, tied=True),
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000),
}


def write_model(out: Path, shape: Shape, *, seed: int, dtype: torch.dtype) -> None:
    """Config, tokenizer and weights in `out`, one shard a layer, so that memory holds one layer."""
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out, shape.vocab)
    (out / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2))
    eos = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(eos))
    index: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(shape, seed, dtype)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _shards(shape: Shape, seed: int, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(*size).normal_(0.0, STD, generator=rng).to(dtype)

    ones = torch.ones(shape.hidden, dtype=dtype)
    yield {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": normal(*size) for name, size in shape.linears.items()}
        tensors[f"{prefix}input_layernorm.weight"] = ones.clone()
        tensors[f"{prefix}post_attention_layernorm.weight"] = ones.clone()
        yield tensors
    head = {} if shape.tied else {"lm_head.weight": normal(shape.vocab, shape.hidden)}
    yield {**head, "model.norm.weight": ones.clone()}


def write_tokenizer(out: Path, vocab: int) -> None:
    """A byte-level BPE trained on this repository's kind of text, padded to exactly `vocab` ids.

    Every padding id decodes to a text of its own, so each generated token shows in a stream.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab, 2048),
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    trained = json.loads(tokenizer.to_str())
    entries: dict[str, int] = trained["model"]["vocab"]
    for number in range(len(entries), vocab):
        entries[f"Ġ<{number}>"] = number
    assert sorted(entries.values()) == list(range(vocab))
    padded = Tokenizer.from_str(json.dumps(trained))
    padded.decoder = decoders.ByteLevel()
    padded.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_adapter(
    out: Path, shape: Shape, *, rank: int, seed: int, dtype: torch.dtype, base: str
) -> None:
    """A PEFT LoRA on all seven linears, ‖ΔW‖/‖W‖ ≈ DELTA at every one of them."""
    out.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    alpha = 2 * rank
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            std_a = columns**-0.5
            std_b = DELTA * STD / (alpha / rank * std_a * rank**0.5)
            a = torch.empty(rank, columns).normal_(0.0, std_a, generator=rng)
            b = torch.empty(rows, rank).normal_(0.0, std_b, generator=rng)
            tensors[f"{prefix}.lora_A.weight"] = a.to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in shape.linears),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_all(
    out: Path,
    shape: Shape,
    *,
    adapters: int,
    seed: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> None:
    """`out/base` and `out/adapters/a00` …, ranks alternating."""
    write_model(out / "base", shape, seed=seed, dtype=dtype)
    for number in range(adapters):
        write_adapter(
            out / "adapters" / f"a{number:02d}",
            shape,
            rank=RANKS[number % len(RANKS)],
            seed=seed * 100_003 + number + 1,
            dtype=adapter_dtype,
            base=str(out / "base"),
        )


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--adapter-dtype", choices=sorted(DTYPES), default="bf16")
    words = parser.parse_args()
    write_all(
        words.out,
        PRESETS[words.preset],
        adapters=words.adapters,
        seed=words.seed,
        dtype=DTYPES[words.dtype],
        adapter_dtype=DTYPES[words.adapter_dtype],
    )
    print(f"{words.out}/base and {words.adapters} adapters in {words.out}/adapters")


if __name__ == "__main__":
    main()
