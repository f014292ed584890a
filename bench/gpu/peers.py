"""The peer: PEFT's mixed batch over bitsandbytes' NF4, against Fader's step at the same depth."""

import dataclasses
import time
from typing import Any

import torch

from bench.gpu.figures import shape_of
from bench.gpu.model import Machine
from bench.gpu.section import ParityFailed, Result, Rig, Unavailable
from bench.gpu.steps import decode
from bench.gpu.timing import Times
from fader_server.model.alone import cache_name

LAYERS = 8
"""Both run so many of the model's layers: PEFT takes long to make 32 adapters for all of them."""


def measure_peft(rig: Rig, result: Result) -> None:
    """One decode step of rows that each use another adapter."""
    if not rig.on_gpu:
        raise Unavailable("bitsandbytes' and PEFT's step is measured on a GPU only")
    try:
        import bitsandbytes  # noqa: F401
        import peft
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed on this machine") from error
    rows, rank = (2, 4) if rig.small else (32, 16)
    rig.kept.pop("machine", None)
    torch.cuda.empty_cache()
    shape = dataclasses.replace(shape_of(rig), layers=2 if rig.small else LAYERS)
    linears = sum(w + o for w, outs in shape.sites for o in outs) * shape.layers
    m = Machine(
        rig, shape, rows=rows, context=48 if rig.small else 300, arena=2 * rows * rank * linears
    )
    slots = m.add_adapters(rows, rank)
    ours = decode(m, [((slot, 1.0),) for slot in slots])
    del m
    torch.cuda.empty_cache()
    model = _peft_model(rig, shape, rows, rank, peft)
    names = [f"a{i}" for i in range(rows)]
    theirs = _decode(rig, model, names, vocab=shape.vocab, context=250 if not rig.small else 20)
    result.add(
        f"{rows} rows with {rows} adapters, r={rank}, {shape.layers} layers: "
        f"{theirs.median / ours.median:.1f}× as fast as PEFT's mixed batch over bitsandbytes",
        rows=rows,
        rank=rank,
        layers=shape.layers,
        **ours.facts("fader"),
        **theirs.facts("peft"),
    )


def _peft_model(rig: Rig, shape: Any, rows: int, rank: int, peft: Any) -> Any:  # noqa: ANN401
    import transformers
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    quantised: Any = Params4bit
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(rig.device):
        build: Any = transformers.AutoModelForCausalLM.from_config
        model = build(config, attn_implementation="sdpa", dtype=rig.dtype).eval()
    for path, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            packed = Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=rig.dtype, quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = quantised(module.weight.data, requires_grad=False, quant_type="nf4")
            packed.weight = weight.to(rig.device)
            parent, _, child = path.rpartition(".")
            setattr(model.model.get_submodule(parent), child, packed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    given = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "init_lora_weights": False,
    }
    own = {"autocast_adapter_dtype": False}
    mixed = peft.get_peft_model(model, peft.LoraConfig(**given), adapter_name="a0", **own)
    for number in range(1, rows):
        rig.check_time()
        mixed.add_adapter(f"a{number}", peft.LoraConfig(**given), **own)
    for name, parameter in mixed.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(rig.device, rig.dtype)
    return mixed.eval()


def _decode(rig: Rig, model: Any, names: list[str], *, vocab: int, context: int) -> Times:  # noqa: ANN401
    rows = len(names)
    ids = torch.randint(0, vocab, (rows, context), device=rig.device)
    found = []
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, adapter_names=names)
        held = cache_name(type(model.get_base_model()))
        assert held is not None
        cache = {held: out[held]}
        token = out.logits[:, -1:].argmax(-1)
        base = model(input_ids=ids[:1], use_cache=False, adapter_names=["__base__"])
        if torch.equal(base.logits[0, -1], out.logits[0, -1]):
            raise ParityFailed("PEFT's adapters change nothing")
        for turn in range(8):
            rig.check_time()
            started = time.perf_counter()
            out = model(input_ids=token, **cache, use_cache=True, adapter_names=names)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()
            if turn:
                found.append((time.perf_counter() - started) * 1e3)
    return Times.of(found)
