"""What a model's files are let in for: pickles are found whatever they are called and wherever they hide."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.control.screening import Broken, Screened, pickle_in, screen


class Trap:
    """What runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("caught",)


TRAPS = [pickle.dumps({"weights": Trap()}, protocol) for protocol in range(6)]


def safetensors(count: int = 4, metadata: dict[str, str] | None = None) -> bytes:
    head: dict[str, Any] = {"w": {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}}
    written = json.dumps(head | ({"__metadata__": metadata} if metadata else {})).encode()
    return len(written).to_bytes(8, "little") + written + b"\0" * 2 * count


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(members: dict[str, bytes], mode: Any = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd"
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def look(files: dict[str, bytes]) -> Screened:
    return screen((path, len(content), io.BytesIO(content)) for path, content in files.items())


def hidden(content: bytes) -> dict[str, bytes]:
    """The same content in every place where it can hide."""
    return {
        "plain": content,
        "weights.dat.gz": gzip.compress(content),
        "weights.bz2": bz2.compress(content),
        "weights.xz": lzma.compress(content),
        "weights.lzma": lzma.compress(content, format=lzma.FORMAT_ALONE),
        "weights.z": zlib.compress(content),
        "in.zip": zipped({"a": b"x", "deep/b": content}),
        "in.tar": tarred({"a": b"x", "b": content}),
        "in.tar.gz": tarred({"a": b"x", "b": content}, "w:gz"),
        "zip.in.tar": tarred({"c": zipped({"b": content})}),
        "gz.in.zip": zipped({"c": gzip.compress(content)}),
    }


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_found_wherever_it_hides(protocol: int) -> None:
    places = hidden(TRAPS[protocol])
    assert {path for path, _ in look(places).pickles} == set(places)


def test_what_is_no_pickle_is_not_taken_for_one_anywhere() -> None:
    for content in (
        b'{"model_type": "llama"}', b"# A model\n", b"not a pickle. (I think)", b"N.", b"", b"\0" * 300,
        b"(c) 2026 by us.\nAll rights\nreserved.", safetensors(), b"\x80 is an octet", "日本語".encode(),
    ):  # fmt: skip
        assert look(hidden(content)).pickles == (), content


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/b.PT", "m.pth", "m.pkl", "m.ckpt", "m.joblib", "m.dill"])
def test_names_of_pickles_are_enough(name: str) -> None:
    ((path, why),) = look({name: b"whatever"}).pickles
    assert path == name
    assert "is the name of" in why


def test_files_of_pytorch_are_known_by_their_content() -> None:
    as_zip = zipped({"archive/data.pkl": TRAPS[2], "archive/data/0": b"\0" * 64})
    ((_, why),) = look({"weights": as_zip}).pickles
    assert "data.pkl" in why
    older = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + TRAPS[2]
    assert look({"weights": older}).pickles


def test_arrays_of_objects_are_pickles_and_arrays_of_numbers_are_not() -> None:
    def npy(descr: str) -> bytes:
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 8

    assert look({"a.npy": npy("|O"), "b.npz": zipped({"x.npy": npy("|O")})}).pickles
    assert look({"a.npy": npy("<f8"), "b.npz": zipped({"x.npy": npy("<f4")})}).pickles == ()


def test_archives_that_would_leave_their_folder_are_broken() -> None:
    for files, told in (
        ({"a.zip": zipped({"../evil": b"x"})}, "'../evil' would leave"),
        ({"a.zip": zipped({"/evil": b"x"})}, "would leave"),
        ({"a.zip": zipped({"a\\..\\evil": b"x"})}, "would leave"),
        ({"a.tar": tarred({"../../evil": b"x"})}, "would leave"),
        ({"a.tar": tarred({"link": b""}, kind=tarfile.SYMTYPE)}, "'link' is a link"),
        ({"a.tar": tarred({"hard": b""}, kind=tarfile.LNKTYPE)}, "'hard' is a link"),
        ({"a.tar": tarred({"null": b""}, kind=tarfile.CHRTYPE)}, "device"),
    ):
        ((_, why),) = look(files).broken
        assert told in why


def test_a_link_in_a_zip_is_found() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    assert "is a link" in look({"a.zip": out.getvalue()}).broken[0][1]


def test_archives_that_are_cut_or_bombs_are_broken_and_cost_little() -> None:
    whole = zipped({"a": b"x" * 1_000})
    assert "cannot be looked through" in look({"a.zip": whole[:-10]}).broken[0][1]
    nest = zipped({"a": b"x"})
    for _ in range(6):
        nest = zipped({"a": nest})
    assert "too deeply" in look({"a.zip": nest}).broken[0][1]
    with pytest.raises(Broken, match="unpack"):
        pickle_in("a", 0, io.BytesIO(gzip.compress(gzip.compress(b"x"))))


def test_what_the_files_say_makes_the_card() -> None:
    found = look(
        {
            "README.md": b"---\nlicense: apache-2.0\nbase_model:\n- base/one\nlibrary_name: transformers\n---\n# Hi\n",
            "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
            "model-1.safetensors": safetensors(4, {"format": "pt"}),
            "model-2.safetensors": safetensors(6),
            "metrics.json": b'{"loss": 1.25, "steps": 100, "note": "x", "ok": true}',
            "modeling.py": b"import os\n",
        }
    )
    card = found.card
    assert (card.format, card.framework, card.architecture) == ("safetensors", "transformers", "LlamaForCausalLM")
    assert (card.base_model, card.licence) == ("base/one", "apache-2.0")
    assert (card.parameters, card.precision, card.code) == (10, "F16", ("modeling.py",))
    assert found.metrics == (("loss", "1.25"), ("steps", "100"))
    assert found.broken == found.pickles == ()


def test_a_broken_file_of_weights_is_named_with_what_is_wrong() -> None:
    whole = safetensors()
    found = look(
        {"fine.safetensors": whole, "cut.safetensors": whole[:-1], "no.safetensors": b"{}", "no.gguf": b"GGUF"}
    )
    assert [path for path, _ in found.broken] == ["cut.safetensors", "no.safetensors", "no.gguf"]
    assert "only 7 bytes come after" in found.broken[0][1]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["a", "a.json", "README.md", "config.json", "metrics.json", "MLmodel", "a.zip", "a.npy", "a.gguf"]),
    st.sampled_from(
        [b"", b"PK\x03\x04", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\x00", b"\x78\x9c", b"\x80\x04", b"---\n", b"{"]
    ),
    st.binary(max_size=400),
)
def test_garbage_is_looked_at_without_harm(name: str, magic: bytes, rest: bytes) -> None:
    for path, why in look({name: magic + rest}).broken:
        assert path == name
        assert why
