"""A base written as a bitsandbytes NF4 checkpoint, whole or not at all."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from fader_adapters.errors import first_line
from fader_server.errors import ConfigInvalid
from fader_server.model.checkpoint import local_copy, of_bitsandbytes, read_config, read_nf4
from fader_server.model.quantizer import packed_stacks

log = logging.getLogger(__name__)

_PROCESSOR = ("*processor_config.json", "chat_template.json")
"""What models that also see or hear have beside a tokenizer, their chat template among it."""


def quantize(source: str, target: Path, *, device: torch.device, experts: bool = False) -> None:
    """Write `source` as a bitsandbytes NF4 checkpoint that transformers and Fader read; with its
    experts in NF4, too, or with linears of another class (Falcon), Fader alone.

    It is written beside the target, or within an empty folder, and renamed when it is whole.
    Raises ConfigInvalid when the target holds something or cannot be written, or the source is
    quantised already.
    """
    config = read_config(source)
    if of_bitsandbytes(config):
        raise ConfigInvalid(f"{source} is quantised already; serve it as it is")
    if target.exists() and not target.is_dir():
        raise ConfigInvalid(f"{target} is no directory; name a new one")
    if target.exists() and any(target.iterdir()):
        raise ConfigInvalid(f"{target} is not empty; name a new directory")
    # a folder that is there may be a mount, or where the user stands: it stays the one it is
    near = target if target.is_dir() else target.parent
    made = near / f".{target.name}.part-{os.getpid()}"
    try:
        with _refusals_of(target):
            made.mkdir(parents=True)
        model = read_nf4(
            source, config, device=device, attn_implementation=None, quantize_experts=experts
        )
        with _refusals_of(target):
            _write(model, source, made)
            if near is target:
                for file in sorted(made.iterdir(), key=lambda file: file.name == CONFIG_NAME):
                    file.rename(target / file.name)  # the config last: without it there is no model
            else:
                made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _refusals_of(target: Path) -> Iterator[None]:
    """What a disk says of what is written for it, in one line."""
    try:
        yield
    except Exception as error:  # tokenizers' own is a bare one
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise ConfigInvalid(f"{target} cannot be written: {first_line(error)}") from error


def _write(model: PreTrainedModel, source: str, target: Path) -> None:
    # packed stacks do not come apart into the matrices that some families store
    packed = any(True for _ in packed_stacks(model))
    model.save_pretrained(target, save_original_format=not packed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        log.warning("no tokenizer was written: %s", first_line(error))
    else:
        tokenizer.save_pretrained(target)
    folder = local_copy(source, _PROCESSOR)
    for pattern in _PROCESSOR:
        for file in folder.glob(pattern):
            (target / file.name).write_bytes(file.read_bytes())
