"""Models and their logits for the tests of weight space; PEFT is the reference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from fader_adapters.architecture import auto_class

IDS = torch.arange(3, 35).unsqueeze(0)

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def load(path: Path, *, quantise: bool = False, dtype="auto") -> PreTrainedModel:
    """Refuses, as transformers does not, a checkpoint with missing or unknown tensors."""
    model, told = auto_class(AutoConfig.from_pretrained(path)).from_pretrained(
        path,
        dtype=dtype,
        device_map={"": "cpu"},
        attn_implementation="eager",
        output_loading_info=True,
        **({"quantization_config": NF4} if quantise else {}),
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return model.eval()


def load_unchecked(path: Path, **given: object) -> PreTrainedModel:
    """As transformers loads it, whatever it makes of the files' tensors."""
    auto = auto_class(AutoConfig.from_pretrained(path))
    return auto.from_pretrained(path, dtype="auto", device_map={"": "cpu"}, **given)


def configure(folder: Path, **changes: object) -> None:
    """Change what a model's config.json says."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits[0].float()


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    """What the base and an adapter say by PEFT, in fp32."""
    model = load(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter).eval())


def peft_merge(base: Path, blend: dict[Path, float], target: Path | None = None) -> PreTrainedModel:
    """PEFT's merge_and_unload of a `cat` of the adapters, in fp32."""
    model = load(base, dtype=torch.float32)
    names = [f"a{i}" for i in range(len(blend))]
    for name, path in zip(names, blend, strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    model.add_weighted_adapter(names, list(blend.values()), "blend", combination_type="cat")
    model.set_adapter("blend")
    merged = model.merge_and_unload()
    if target is not None:
        merged.save_pretrained(target)
    return merged


def rewrite(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model in one file, its tensors changed in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
