"""Safetensors buffers: what the library accepts and an adapter may not be."""

import json
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load

from fader_adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from fader_adapters.header import read_header
from fader_adapters.limits import Limits
from fader_adapters.source import RawAdapter
from tests.adapters.peft_files import make_raw, read

GOOD = make_raw().weights


def build(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_good_file_is_read_in_file_order():
    infos = read_header(GOOD, Limits())
    tensors = load(GOOD)
    assert {info.name: info.shape for info in infos} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    assert [i.start for i in infos] == sorted(i.start for i in infos)
    assert infos[-1].end == len(GOOD)


def test_the_builder_of_these_tests_can_build_a_good_file():
    (info,) = read_header(
        build({"__metadata__": {"format": "pt"}, "a": entry()}, b"\0" * 4), Limits()
    )
    assert (info.name, info.dtype, info.shape, info.end - info.start) == ("a", "F32", (1,), 4)


BAD = {
    "empty": b"",
    "short": b"\0" * 7,
    "header past the end": build({"a": entry()}, b"\0" * 4, size=4000),
    "not json": build(b"{nope", b""),
    "not utf-8": build(b'{"\xff": 1}', b""),
    "not an object": build([1], b""),
    "nan": build(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"\0" * 4),
    "nested": build(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "digits": build(b'{"a": ' + b"1" * 5000 + b"}"),
    "no tensors": build({"__metadata__": {}}),
    "metadata": build({"__metadata__": {"a": 1}, "a": entry()}, b"\0" * 4),
    "duplicate": build(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "duplicate field": build(
        b'{"a":{"dtype":"F16","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "extra field": build({"a": {**entry(), "x": 1}}, b"\0" * 4),
    "missing field": build({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "not a field": build({"a": 3}, b"\0" * 4),
    "no name": build({"": entry()}, b"\0" * 4),
    "long name": build({"x" * 600: entry()}, b"\0" * 4),
    "zero dimension": build({"a": entry(shape=[0, 1 << 62], offsets=[0, 0])}),
    "negative": build({"a": entry(shape=[-1, -1])}, b"\0" * 4),
    "boolean": build({"a": entry(shape=[True])}, b"\0" * 4),
    "float": build({"a": entry(shape=[1.0])}, b"\0" * 4),
    "huge": build({"a": entry(shape=[1 << 62, 1 << 62])}, b"\0" * 4),
    "many dimensions": build({"a": entry(shape=[1] * 9)}, b"\0" * 4),
    "integers": build({"a": entry("I32")}, b"\0" * 4),
    "fp8": build({"a": entry("F8_E4M3", offsets=[0, 1])}, b"\0"),
    "dtype list": build({"a": entry(["F32"])}, b"\0" * 4),
    "offsets reversed": build({"a": entry(offsets=[4, 0])}, b"\0" * 4),
    "offsets one": build({"a": entry(offsets=[0])}, b"\0" * 4),
    "offsets text": build({"a": entry(offsets=["0", "4"])}, b"\0" * 4),
    "does not fill": build({"a": entry(shape=[2])}, b"\0" * 4),
    "truncated": GOOD[:-1],
    "padded": GOOD + b"\0",
    "late start": build({"a": entry(offsets=[4, 8])}, b"\0" * 8),
    "hole": build({"a": entry(), "b": entry(offsets=[8, 12])}, b"\0" * 12),
    "overlap": build({"a": entry(), "b": entry(offsets=[0, 4])}, b"\0" * 4),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_invalid(name):
    with pytest.raises(AdapterInvalid):
        read_header(BAD[name], Limits())


@pytest.mark.parametrize("filled", [True, False])
def test_numbers_longer_than_python_writes_are_refused_in_few_words(filled):
    count = (10**4300 - 1) // 4  # of 4300 digits, in bytes
    shape = [count] if filled else [count, 4]
    bomb = build({"a": entry(shape=shape, offsets=[0, 4 * count])}, b"\0" * 4)
    with pytest.raises(AdapterInvalid, match="the file has 4 bytes of data") as caught:
        read_header(bomb, Limits())
    assert len(str(caught.value)) < 300


def test_limits_are_checked_before_the_header_is_parsed():
    with pytest.raises(AdapterTooLarge, match="bytes"):
        read_header(GOOD, Limits(file_bytes=len(GOOD) - 1))
    with pytest.raises(AdapterTooLarge, match="header"):
        read_header(build(b" " * 4000), Limits(header_bytes=3999))
    with pytest.raises(AdapterTooLarge, match="18 tensors"):
        read_header(GOOD, Limits(tensors=17))
    assert read_header(GOOD, Limits(tensors=18))


def test_a_header_of_a_million_tensors_is_refused_at_once():
    names = (
        f'"{i}":{{"dtype":"F16","shape":[1],"data_offsets":[{2 * i},{2 * i + 2}]}}'
        for i in range(10**6)
    )
    bomb = build(("{" + ",".join(names) + "}").encode(), b"\0" * 2 * 10**6)
    start = time.process_time()
    with pytest.raises(AdapterTooLarge):
        read_header(bomb, Limits())
    assert time.process_time() - start < 0.5


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_still_a_whole_adapter(data):
    """Whatever is accepted, the safetensors library reads the same way."""
    raw = make_raw()
    weights = bytearray(raw.weights)
    header_end = 8 + int.from_bytes(weights[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        weights[data.draw(st.integers(0, header_end))] = data.draw(st.integers(0, 255))
    try:
        read(RawAdapter(raw.config, bytes(weights), "fuzz"))
    except AdapterError:  # any other exception fails this test
        return
    load(bytes(weights))


_scalars = st.none() | st.booleans() | st.integers(-4, 1 << 65) | st.text(max_size=3)
_fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8"]) | _scalars,
        "shape": st.lists(st.integers(-1, 4) | _scalars, max_size=3) | _scalars,
        "data_offsets": st.lists(st.integers(-4, 64) | _scalars, max_size=3) | _scalars,
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), _fields | _scalars, max_size=3), st.integers(0, 64))
def test_any_header_is_refused_by_name_or_read_as_the_library_reads_it(header, size):
    weights = build(header, b"\0" * size)
    try:
        infos = read_header(weights, Limits())
    except (AdapterInvalid, AdapterTooLarge):
        return
    try:
        tensors = load(weights)
    except SafetensorError as error:  # accepting more than the library is a defect
        pytest.fail(str(error))
    assert {i.name: i.shape for i in infos} == {k: tuple(t.shape) for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("lying", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"<HTML></HTML>", "a web page"),
    ],
)
def test_what_often_lies_in_the_place_of_weights_is_told_by_name(lying: bytes, what: str):
    with pytest.raises(AdapterInvalid, match=what):
        read_header(lying, Limits())
    with pytest.raises(AdapterTooLarge, match="the header"):  # anything else is a length
        read_header(b"x" + lying, Limits())


def test_metadata_that_mlx_leaves_out_as_null_is_none():
    (info,) = read_header(build({"__metadata__": None, "a": entry()}, b"\0" * 4), Limits())
    assert info.name == "a"


def test_weights_that_were_not_gathered_say_so():
    with pytest.raises(AdapterInvalid, match="not gathered"):
        read_header(build({"a": entry(shape=(0,), offsets=(0, 0))}), Limits())
    with pytest.raises(AdapterInvalid, match="sizes ≥ 1"):
        read_header(build({"a": entry(shape=(-1,))}, b"\0" * 4), Limits())
