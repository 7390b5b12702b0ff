"""Headers of weights: what is written as it has to be is read, and everything else is refused, whatever it is."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.core import weights
from tidemill.core.weights import Truncated, read_gguf, read_safetensors, safetensors_header_size

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
TENSORS = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=6)


def header_of(tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


def laid(shapes: list[tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    """Tensors one after the other, and where the last ends."""
    at, found = 0, {}
    for number, (dtype, shape) in enumerate(shapes):
        size = DTYPES[dtype]
        for each in shape:
            size *= each
        found[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return found, at


def check_reading(shapes: list[Any], random: Any) -> None:
    tensors, size = laid(shapes)
    names = list(tensors)
    random.shuffle(names)
    found = read_safetensors(header_of({name: tensors[name] for name in names}), size)
    assert found.tensors == len(shapes)
    assert sum(DTYPES[dtype] * count for dtype, count in found.precisions.items()) == size


@given(TENSORS, st.randoms(use_true_random=False))
def test_tensors_that_follow_each_other_are_read_in_any_order(shapes: list[Any], random: Any) -> None:
    check_reading(shapes, random)


def test_the_property_catches_a_reader_that_takes_the_order_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsorted(list[Any]):
        def sort(self, **_: Any) -> None: ...

    checked = weights._check_covering
    monkeypatch.setattr(weights, "_check_covering", lambda spans, size: checked(Unsorted(spans), size))

    @settings(max_examples=2_000, database=None, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(TENSORS, st.randoms(use_true_random=False))
    def run(shapes: list[Any], random: Any) -> None:
        check_reading(shapes, random)

    with pytest.raises(ValueError, match=r"belong to no tensor|before"):
        run()


@st.composite
def crooked(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Tensors of which at least one octet belongs to two, to none, or is not there."""
    shapes = draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=5
        )
    )
    tensors, size = laid(shapes)
    if draw(st.booleans()):
        return tensors | {"twin": tensors[max(tensors)]}, size
    name = draw(st.sampled_from(sorted(tensors)))
    by = draw(st.integers(1, 9)) * draw(st.sampled_from((1, -1)))
    if draw(st.booleans()):
        return tensors, max(0, size + by)
    if draw(st.booleans()):
        tensors[max(tensors)]["data_offsets"] = [at + abs(by) for at in tensors[max(tensors)]["data_offsets"]]
        return tensors, size + abs(by)
    start, end = tensors[name]["data_offsets"]
    tensors[name]["data_offsets"] = [max(0, start + by), max(0, start + by) + end - start]
    return tensors, size if max(0, start + by) != start else size + 1


def check_nothing_crooked_is_read(examples: int) -> None:
    @settings(max_examples=examples, database=None, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(crooked())
    def run(case: tuple[dict[str, Any], int]) -> None:
        tensors, size = case
        with pytest.raises(ValueError, match=r"tensor|bytes"):
            read_safetensors(header_of(tensors), size)

    run()


def test_octets_that_belong_to_two_tensors_or_to_none_are_refused() -> None:
    check_nothing_crooked_is_read(200)


@pytest.mark.parametrize("forgotten", ["within", "none", "end"])
def test_the_property_catches_a_check_that_forgets(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(spans: list[tuple[int, int, str]], size: int) -> None:
        spans.sort()
        at = 0
        for start, end, _ in spans:
            if (start < at and forgotten != "within") or (start > at and forgotten != "none"):
                raise ValueError("tensor")
            at = end
        if at != size and forgotten != "end":
            raise ValueError("bytes")

    monkeypatch.setattr(weights, "_check_covering", planted)
    with pytest.raises(BaseException, match=r"DID NOT RAISE"):
        check_nothing_crooked_is_read(200)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(st.one_of(st.binary(max_size=200), JSON.map(lambda it: json.dumps(it).encode())), st.integers(0, 64))
def test_garbage_is_refused_with_a_sentence_and_nothing_else(header: bytes, size: int) -> None:
    with contextlib.suppress(ValueError):
        assert read_safetensors(header, size).format == "safetensors"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', "twice"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}', "NaN"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,true]}}', "data_offsets"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', "data_offsets"),
        (b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "shape"),
        (b'{"a":{"dtype":"U8","shape":[9999999999,9999999999],"data_offsets":[0,1]}}', "more elements"),
        (b'{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}}', "'Q4'"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1]}}', "needs 8"),
        (b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}', "needs 0.5"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', "just dtype"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b"[]", "begin with {"),
        (b"{\xff}", "UTF-8"),
        (b'{"a":' + b"9" * 5_000 + b"}", "not JSON"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(header: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_safetensors(header, 1)


def test_the_length_of_a_header_is_bounded_before_anything_is_read() -> None:
    assert safetensors_header_size((40).to_bytes(8, "little"), 48) == 40
    for first, size, told in (
        (b"\xff" * 8, 1_000, "only 992"),
        ((33 << 20).to_bytes(8, "little"), 1 << 40, "at most"),
        (b"\0" * 8, 8, "cannot be"),
        (b"short", 5, "begins with"),
    ):
        with pytest.raises(ValueError, match=told):
            safetensors_header_size(first, size)


# GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: list[tuple[str, list[int], int, int]], *, pairs: int = 1, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), pairs)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama") if pairs else b""
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", one) for one in shape)
        head += struct.pack("<IQ", kind, offset)
    return head


def padded(head: bytes, data: int) -> int:
    return -(-len(head) // 32) * 32 + data


def test_gguf_is_read_and_its_parameters_are_counted() -> None:
    head = gguf([("a", [32, 4], 2, 0), ("b", [3], 0, 96)])
    found = read_gguf(head, padded(head, 96 + 12))
    assert found.metadata["general.architecture"] == "llama"
    assert dict(found.precisions) == {"Q4_0": 128, "F32": 3}
    for cut in range(len(head)):
        with pytest.raises(Truncated):
            read_gguf(head[:cut], 10_000)


@pytest.mark.parametrize(
    ("head", "size", "told"),
    [
        (gguf([("a", [32], 0, 0)]), 64, "ends at"),
        (gguf([("a", [33], 2, 0)]), 9_999, "blocks of 32"),
        (gguf([("a", [32], 99, 0)]), 9_999, "not known"),
        (gguf([("a", [32], 0, 4)]), 9_999, "multiple of 32"),
        (gguf([("a", [32], 0, 0), ("b", [32], 0, 32)]), 9_999, "within 'a'"),
        (gguf([("a", [32], 0, 0), ("a", [32], 0, 128)]), 9_999, "same name"),
        (gguf([("a", [1 << 40, 1 << 40], 0, 0)]), 9_999, "more elements"),
        (gguf([], version=7), 9_999, "version 7"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), 9_999, "more than can be"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 77), 9_999, "type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50), 9_999, "said to have"),
    ],
)  # fmt: skip
def test_each_mistake_of_gguf_is_named(head: bytes, size: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_gguf(head, size)


@given(st.binary(max_size=300), st.integers(0, 2**40))
def test_garbage_after_the_magic_is_refused_or_wants_more(rest: bytes, size: int) -> None:
    with contextlib.suppress(ValueError, Truncated):
        assert read_gguf(b"GGUF" + struct.pack("<I", 3) + rest, size).format == "gguf"
