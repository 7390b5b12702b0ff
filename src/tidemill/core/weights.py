"""What the headers of files of weights say, checked as strictly as their formats allow: safetensors and GGUF.

Only the header is looked at, never the weights, and never more of it than a bound: whatever comes, the work is
bounded. A file that is not exactly what its header says is refused, because loaders differ in what they make of it.

Source: the layout of safetensors is its length as 8 bytes, little-endian, that many bytes of JSON, then the tensors,
without a gap or an overlap up to the file's end. GGUF, versions 2 and 3: magic, version, counts, key-value pairs,
tensor infos, padding, tensors at multiples of the alignment.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

SAFETENSORS_HEADER_MAX: Final = 32 << 20
GGUF_HEADER_MAX: Final = 64 << 20
GGUF_MAGIC: Final = b"GGUF"
_MAX_TENSORS: Final = 1_000_000
_MAX_PAIRS: Final = 100_000
_MAX_NAME: Final = 4_096
_MAX_DIMENSIONS: Final = 16
_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
"""The bits of an element of each data type of safetensors."""
_GGML: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""The name, the elements of a block and its bytes, of each data type of GGUF."""
_SCALARS: Final[Mapping[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a file of weights has: numbers of ``tensors`` and of parameters by data type, and what else it says."""

    format: str
    tensors: int
    precisions: Mapping[str, int]
    metadata: Mapping[str, str]


class Truncated(Exception):
    """The octets end before the header does."""


def safetensors_header_size(first: bytes, size: int) -> int:
    """The bytes of the header of a file of ``size`` bytes, of which ``first`` are the first eight.

    Raises: ValueError that says what is wrong.
    """
    if len(first) < 8 or size < 8:
        raise ValueError(f"it has {size:,} bytes, and a safetensors file begins with the 8 of its header's length")
    length = int.from_bytes(first[:8], "little")
    if length > size - 8:
        raise ValueError(f"its header is said to have {length:,} bytes, and only {size - 8:,} come after the length")
    if length > SAFETENSORS_HEADER_MAX:
        raise ValueError(f"its header has {length:,} bytes; at most {SAFETENSORS_HEADER_MAX:,} are read")
    if length < 2:
        raise ValueError(f"its header has {length} bytes, which cannot be a JSON object")
    return length


def read_safetensors(header: bytes, data_size: int) -> Weights:
    """What a safetensors file has whose header is followed by ``data_size`` bytes.

    Raises: ValueError that names the tensor and what is wrong with it.

    >>> read_safetensors(b'{"w":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}', 12).precisions
    {'F16': 6}
    """
    if header[:1] != b"{":
        raise ValueError("its header does not begin with {")
    try:
        given = json.loads(header, object_pairs_hook=_without_twins, parse_constant=_not_json)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise ValueError("its header is not a JSON object")
    metadata = given.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of texts to texts")
    if len(given) > _MAX_TENSORS:
        raise ValueError(f"its header names {len(given):,} tensors; at most {_MAX_TENSORS:,} are read")
    spans: list[tuple[int, int, str]] = []
    counts: dict[str, int] = {}
    for name, tensor in given.items():
        dtype, count, start, end = _tensor(name, tensor)
        counts[dtype] = counts.get(dtype, 0) + count
        spans.append((start, end, name))
    _check_covering(spans, data_size)
    return Weights(format="safetensors", tensors=len(spans), precisions=_most_first(counts), metadata=metadata)


def _tensor(name: str, tensor: Any) -> tuple[str, int, int, int]:
    """The data type, the number of elements, and where the tensor begins and ends."""
    told = name[:100]
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {told!r} does not have just dtype, shape and data_offsets")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {told!r} has the data type {str(dtype)[:40]!r}, which there is not")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {told!r} has no shape of up to {_MAX_DIMENSIONS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {told!r} has no data_offsets of a beginning and an end")
    count = 1
    for size in shape:
        count *= size
        if count > 1 << 62:
            raise ValueError(f"tensor {told!r} has a shape of more elements than can be")
    bits = count * _BITS[dtype]
    start, end = offsets
    if bits % 8 or end - start != bits // 8:
        raise ValueError(
            f"tensor {told!r} has {end - start:,} bytes, and its shape {shape} of {dtype} needs {bits / 8:,.10g}"
        )
    return dtype, count, start, end


def _check_covering(spans: list[tuple[int, int, str]], data_size: int) -> None:
    """Raises: ValueError unless the tensors follow each other from the first byte to the last."""
    spans.sort()
    at, before = 0, ""
    for start, end, name in spans:
        if start < at:
            raise ValueError(f"tensor {name[:100]!r} begins at {start:,}, before {before[:100]!r} ends at {at:,}")
        if start > at:
            raise ValueError(f"{start - at:,} bytes before tensor {name[:100]!r} belong to no tensor")
        at, before = end, name
    if at > data_size:
        raise ValueError(f"tensor {before[:100]!r} ends at {at:,}, and only {data_size:,} bytes come after the header")
    if at < data_size:
        raise ValueError(f"its last {data_size - at:,} bytes belong to no tensor")


def read_gguf(head: bytes, size: int) -> Weights:
    """What a GGUF file of ``size`` bytes has, of which ``head`` is the beginning.

    Raises: ValueError that says what is wrong; Truncated when more of its beginning is needed.
    """
    reader = _Reader(head)
    if reader.take(4) != GGUF_MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("<I")
    if version in (0x02000000, 0x03000000):
        raise ValueError("it is of a big-endian machine; convert it for little-endian ones")
    if version not in (2, 3):
        raise ValueError(f"it is of GGUF version {version}; 2 and 3 are read")
    tensors, pairs = reader.number("<Q"), reader.number("<Q")
    if tensors > _MAX_TENSORS or pairs > _MAX_PAIRS:
        raise ValueError(f"it is said to have {tensors:,} tensors and {pairs:,} settings, more than can be")
    metadata: dict[str, str] = {}
    for _ in range(pairs):
        key = reader.text()
        value = reader.value(reader.number("<I"))
        if key in metadata:
            raise ValueError(f"the setting {key[:100]!r} is there twice")
        metadata[key] = value
    infos = [_gguf_tensor(reader) for _ in range(tensors)]
    given = metadata.get("general.alignment", "32")
    alignment = int(given) if given.isascii() and given.isdigit() else 0
    if not alignment or alignment % 8 or alignment > 1 << 20:
        raise ValueError(f"its general.alignment is {given[:40]!r}, which is no multiple of 8")
    data = -(-reader.at // alignment) * alignment
    counts: dict[str, int] = {}
    end, before = 0, ""
    for name, dtype, count, octets, offset in sorted(infos, key=lambda info: info[4]):
        if offset % alignment or offset < end:
            where = f"within {before[:100]!r}" if offset < end else f"at no multiple of {alignment}"
            raise ValueError(f"tensor {name[:100]!r} begins at {offset:,}, {where}")
        counts[dtype] = counts.get(dtype, 0) + count
        end, before = offset + octets, name
    if infos and data + end > size:
        raise ValueError(f"tensor {before[:100]!r} ends at {data + end:,}, and the file has {size:,} bytes")
    if len({info[0] for info in infos}) < len(infos):
        raise ValueError("two of its tensors have the same name")
    return Weights(format="gguf", tensors=tensors, precisions=_most_first(counts), metadata=metadata)


def _gguf_tensor(reader: _Reader) -> tuple[str, str, int, int, int]:
    """The name, data type, number of elements, bytes and offset of a tensor."""
    name = reader.text()
    dimensions = reader.number("<I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name[:100]!r} has {dimensions:,} dimensions")
    count = 1
    for _ in range(dimensions):
        count *= reader.number("<Q")
        if count > 1 << 62:
            raise ValueError(f"tensor {name[:100]!r} has a shape of more elements than can be")
    kind = reader.number("<I")
    if kind not in _GGML:
        raise ValueError(f"tensor {name[:100]!r} has the data type {kind}, which is not known")
    dtype, elements, octets = _GGML[kind]
    if count % elements:
        raise ValueError(f"tensor {name[:100]!r} has {count:,} elements, and {dtype} has blocks of {elements}")
    return name, dtype, count, count // elements * octets, reader.number("<Q")


class _Reader:
    """Reads what is packed, from the front. Raises, from every method: Truncated."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._octets) - self.at:
            raise Truncated
        taken = self._octets[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, form: str) -> int:
        found: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def text(self) -> str:
        length = self.number("<Q")
        if length > GGUF_HEADER_MAX:
            raise ValueError(f"a text in its header is said to have {length:,} bytes")
        return self.take(length).decode(errors="replace")

    def value(self, kind: int) -> str:
        """A value as text; of arrays only how many they have, since those are vocabularies."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            self._skip(inner, count)
            return f"[{count}]"
        if kind not in _SCALARS:
            raise ValueError(f"a setting in its header is of type {kind}, which there is not")
        return str(self.number(_SCALARS[kind]))

    def _skip(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self.take(min(count * struct.calcsize(_SCALARS[kind]), 1 << 62))
        elif kind == _STRING:
            if count * 8 > GGUF_HEADER_MAX:
                raise ValueError(f"an array in its header is said to have {count:,} texts")
            for _ in range(count):
                self.take(min(self.number("<Q"), 1 << 62))
        else:
            raise ValueError(f"an array in its header is of type {kind}, which there is not")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twin[:100]!r} is there twice")
    if any(len(key) > _MAX_NAME for key in found):
        raise ValueError(f"a name has more than {_MAX_NAME:,} characters")
    return found


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(_by_count(counts))


def _by_count(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    yield from sorted(counts.items(), key=lambda item: (-item[1], item[0]))
