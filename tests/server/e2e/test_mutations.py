"""One good adapter made wrong in every way: each is a 400 that says what, and nothing changes."""

import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE
from fader_server import demo
from tests.server.e2e.conftest import Running

Tensors = dict[str, torch.Tensor]
GOOD = demo.adapter_dirs()["shout"]


def name_of(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def config(**changes: Any) -> Callable:
    """A change of fields; `...` removes one."""

    def change(fields: dict, tensors: Tensors) -> None:
        fields.update(changes)
        for key in [key for key, value in fields.items() if value is ...]:
            del fields[key]

    return change


def tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def apply(fields: dict, tensors: Tensors) -> None:
        name = name_of(tensors, part)
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def rename(old: str, new: str) -> Callable:
    def apply(fields: dict, tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return apply


def drop(part: str) -> Callable:
    return lambda fields, tensors: tensors.pop(name_of(tensors, part))


def add(name: str) -> Callable:
    return lambda fields, tensors: tensors.update({name: torch.ones(2, 2)})


def poison(value: float) -> Callable:
    def change(matrix: torch.Tensor) -> torch.Tensor:
        matrix[0, 0] = value
        return matrix

    return tensor("layers.1.mlp.up_proj.lora_B", change)


A, B = "layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"
BOMB = "(a+)+" * 12 + "$"
CHANGED: dict[str, tuple[Callable, str]] = {
    "module renamed": (rename("q_proj", "qq_proj"), "adapter_"),
    "layer beyond the last": (rename("layers.0.", "layers.99."), "adapter_"),
    "factor renamed": (rename("lora_A", "lora_Q"), "adapter_invalid"),
    "A dropped": (drop(A), "adapter_invalid"),
    "B dropped": (drop(B), "adapter_invalid"),
    "one module dropped": (
        lambda fields, tensors: [tensors.pop(name_of(tensors, part)) for part in (A, B)],
        "adapter_invalid",
    ),
    "stranger added": (add("base_model.model.x.weight"), "adapter_invalid"),
    "second adapter added": (add(f"base_model.model.model.{A}.other.weight"), "adapter_invalid"),
    "norm added": (add("base_model.model.model.norm.weight"), "adapter_invalid"),
    "A transposed": (tensor(A, torch.t), "adapter_"),
    "B transposed": (tensor(B, torch.t), "adapter_"),
    "a rank of its own": (tensor(A, lambda a: a[:1]), "adapter_invalid"),
    "narrower input": (tensor(A, lambda a: a[:, 1:]), "adapter_mismatch"),
    "wider output": (tensor(B, lambda b: torch.cat([b, b[:1]])), "adapter_mismatch"),
    "not a matrix": (tensor(A, lambda a: a[None]), "adapter_invalid"),
    "empty": (tensor(A, lambda a: a[:0]), "adapter_"),
    "NaN": (poison(float("nan")), "adapter_invalid"),
    "Inf": (poison(float("inf")), "adapter_invalid"),
    "huge": (poison(3e38), "adapter_invalid"),
    "integers": (tensor(A, lambda a: a.to(torch.int32)), "adapter_invalid"),
    "no effect": (
        lambda fields, tensors: tensors.update(
            {name: t * 0 for name, t in tensors.items() if "lora_B" in name}
        ),
        "adapter_invalid",
    ),
    "no tensors": (lambda fields, tensors: tensors.clear(), "adapter_invalid"),
    "wrong r": (config(r=5), "adapter_invalid"),
    "r 0": (config(r=0), "adapter_invalid"),
    "r negative": (config(r=-1), "adapter_invalid"),
    "r true": (config(r=True), "adapter_invalid"),
    "r a million": (config(r=1 << 20), "adapter_"),
    "r missing": (config(r=...), "adapter_invalid"),
    "alpha NaN": (config(lora_alpha=float("nan")), "adapter_invalid"),
    "alpha text": (config(lora_alpha="8"), "adapter_invalid"),
    "alpha enormous": (config(lora_alpha=1e30), "adapter_invalid"),
    "dora without magnitudes": (config(use_dora=True), "adapter_invalid"),
    "lora_bias without biases": (config(lora_bias=True), "adapter_invalid"),
    "bias": (config(bias="most"), "adapter_invalid"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "adapter_invalid"),
    "pissa": (config(init_lora_weights="pissa"), "adapter_invalid"),
    "unknown flag": (config(use_magic=True), "adapter_invalid"),
    "another method": (config(peft_type="LOHA"), "adapter_invalid"),
    "fewer targets": (config(target_modules=["q_proj"]), "adapter_invalid"),
    "other targets": (config(target_modules=["y_proj", "z_proj"]), "adapter_mismatch"),
    "no targets": (config(target_modules=[]), "adapter_invalid"),
    "regex bomb": (config(target_modules=BOMB), "adapter_invalid"),
    "back reference": (config(target_modules=r"(.*)\1"), "adapter_invalid"),
}


HARMLESS = {
    # PEFT ignores it where the base has linears
    "fan_in_fan_out": config(fan_in_fan_out=True),
    # matched without backtracking, and it matches nothing
    "regex bomb in ranks": config(rank_pattern={BOMB: 4}),
}


def header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """The weights with another header over the same bytes."""

    def apply(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        fields = json.loads(data[8 : 8 + size])
        fields.pop("__metadata__", None)
        change(fields)
        told = json.dumps(fields).encode()
        return struct.pack("<Q", len(told)) + told + data[8 + size :]

    return apply


def first(fields: dict) -> dict:
    return fields[sorted(fields)[0]]


def overlap(fields: dict) -> None:
    one, two = sorted(fields)[:2]
    fields[one]["data_offsets"] = fields[two]["data_offsets"]


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty file": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "last byte missing": lambda data: data[:-1],
    "a byte too many": lambda data: data + b"\0",
    "header beyond the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of exabytes": lambda data: struct.pack("<Q", 1 << 62) + data[8:],
    "header cut": lambda data: struct.pack("<Q", 10) + data[8:],
    "header no object": lambda data: struct.pack("<Q", 2) + b"[]",
    "pickle": lambda data: b"\x80\x04}." + data,
    "overlap": header(overlap),
    "offsets backwards": header(lambda h: first(h)["data_offsets"].reverse()),
    "offset negative": header(lambda h: first(h).update(data_offsets=[-4, 4])),
    "shape lies": header(lambda h: first(h).update(shape=[1, 1])),
    "shape negative": header(lambda h: first(h).update(shape=[-1, -64])),
    "shape overflows": header(lambda h: first(h).update(shape=[1 << 62, 4])),
    "unknown dtype": header(lambda h: first(h).update(dtype="F3")),
    "field added": header(lambda h: first(h).update(extra=1)),
}
CONFIGS: dict[str, bytes] = {
    "no JSON": b"{",
    "no object": b"[1]",
    "a field twice": b'{"r": 4, "r": 8}',
    "no text": b"\xff\xfe",
    "deep": b"[" * 5000 + b"]" * 5000,
    "empty": b"",
}


@pytest.fixture(scope="module")
def place(server: Running):
    """PUT of given files under one name, and the name's report before and after."""
    url = f"{server.url}/v1/adapters/mutant"
    good = httpx.put(url, json={"source": "copy-of-shout"}, timeout=60)
    assert good.status_code in (200, 201)
    version = good.json()["version"]
    folder = server.root / "mutated"
    folder.mkdir()

    def put(fields: bytes, weights: bytes) -> tuple[int, dict]:
        (folder / CONFIG_FILE).write_bytes(fields)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        answer = httpx.put(url, json={"source": "mutated"}, timeout=60)
        kept = httpx.get(url, timeout=30).json()["version"] == version
        if answer.status_code == 200:
            httpx.put(url, json={"source": "copy-of-shout"}, timeout=60)
        else:
            assert kept, "a refused load moved the name"
        return answer.status_code, answer.json()

    yield put
    assert httpx.delete(url).status_code == 200


def refused(answer: tuple[int, dict], code: str) -> None:
    status, body = answer
    error = body["error"]
    assert (status, error["type"]) == (400, "invalid_request_error"), body
    assert error["code"].startswith(code), error
    assert len(error["message"]) < 600
    assert str(GOOD) not in error["message"]


def files() -> tuple[dict, Tensors]:
    return json.loads((GOOD / CONFIG_FILE).read_text()), load((GOOD / WEIGHTS_FILE).read_bytes())


def test_the_good_one_loads(place):
    """The control: what follows is refused for its change alone."""
    fields, tensors = files()
    status, body = place(json.dumps(fields).encode(), save(tensors))
    assert status == 200, body


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_changes_nothing_loads(kind, place):
    fields, tensors = files()
    HARMLESS[kind](fields, tensors)
    status, body = place(json.dumps(fields).encode(), save(tensors))
    assert status == 200, body


@pytest.mark.parametrize("kind", CHANGED)
def test_a_changed_adapter_is_refused(kind, place):
    change, code = CHANGED[kind]
    fields, tensors = files()
    change(fields, tensors)
    refused(place(json.dumps(fields).encode(), save(tensors)), code)


@pytest.mark.parametrize("kind", BYTES)
def test_broken_weights_are_refused(kind, place):
    fields, tensors = files()
    refused(place(json.dumps(fields).encode(), BYTES[kind](save(tensors))), "adapter_")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_config_is_refused(kind, place):
    refused(place(CONFIGS[kind], save(files()[1])), "adapter_invalid")
