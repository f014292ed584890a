"""Measures the demo with transformers + PEFT on the dequantised NF4 base, before any server exists.

python -m bench.demo.measure_peft --base DIR --adapters DIR [--only TEXT] [--samples]
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer

from bench.demo.conditions import Condition, conditions, measure
from bench.demo.quantise import load_dequantised


class PeftAnswers:
    """Answers rows of questions in one left-padded batch."""

    def __init__(self, base: Path, adapters: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        folders = sorted(adapters.iterdir())
        model = load_dequantised(base)
        self._model = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            self._model.load_adapter(folder, adapter_name=folder.name)
        self._model.to(dtype).eval()
        self._blends = 0

    @torch.inference_mode()
    def __call__(self, condition: Condition) -> list[str]:
        """Greedy answers to the condition's questions."""
        prompts = [
            self._tokenizer.apply_chat_template(
                ([{"role": "system", "content": condition.system}] if condition.system else [])
                + [{"role": "user", "content": item.question}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for item in condition.items
        ]
        batch = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        if condition.terms:
            self._select(condition)
            out = self._generate(batch)
        else:
            with self._model.disable_adapter():
                out = self._generate(batch)
        answers = out[:, batch["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _generate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=64,
            do_sample=False,
        )

    def _select(self, condition: Condition) -> None:
        self._blends += 1
        name = f"blend{self._blends}"
        names, weights = zip(*condition.terms, strict=True)
        self._model.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")
        self._model.set_adapter(name)
        # PEFT's "cat" has folded every scale into the factors already, but gives the result the
        # first adapter's rsLoRA flag and with it a scale of √r; it must be 1.
        for module in self._model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] = 1.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", action="store_true")
    args = parser.parse_args()
    answers = PeftAnswers(args.base, args.adapters, getattr(torch, args.dtype))
    for condition in conditions():
        if args.only not in condition.label:
            continue
        result = measure(condition, answers)
        mark = "" if condition.passes(result.share) else "  <-- misses its bar"
        shares = f"{result.share:6.1%}  exact {result.exact:6.1%}  plain {result.plain:6.1%}"
        print(f"{condition.label:55} {shares}{mark}", flush=True)
        for question, text in result.samples if args.samples else ():
            print(f"    {question}  ->  {text}")


if __name__ == "__main__":
    main()
