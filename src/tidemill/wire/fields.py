"""What each field of a workload file takes, and what it becomes."""

from __future__ import annotations

import difflib
import posixpath
from functools import lru_cache
from typing import Final

from tidemill.model.registry import parse_model_reference
from tidemill.model.resources import GpuRequest, parse_gpus
from tidemill.model.spec import (
    MAX_FALLBACKS,
    MAX_PRICE_MICRO,
    MAX_WAIT_NS,
    SECRET_NAME,
    Affinity,
    Kind,
    Port,
    RetryOn,
    parse_retry_on,
)
from tidemill.model.storage import DataMode
from tidemill.units import MILLI, USD_MICRO
from tidemill.wire.checks import (
    ARTIFACT,
    DATASET,
    DIGEST,
    HIGHEST_PORT,
    LOWEST_PORT,
    MAX_BYTES,
    MAX_CPUS,
    MAX_GPUS,
    PORT_NAME,
    PYTHON,
    Refusal,
    duration_of,
    grace_of,
    list_of,
    short,
    shown,
    text_of,
    whole_number,
)


def cpus_of(value: object) -> int:
    """Milli-CPU."""
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{shown(value)} is not a number of CPUs.", "Write for example 4, or 0.5 for half a core.")
    if not 0 < value <= MAX_CPUS or not (milli := round(value * MILLI)):
        raise Refusal(f"{shown(value)} CPUs cannot be asked for.", "Write for example 4, or 0.5 for half a core.")
    return milli


_GPU_MEND: Final = "Write for example H100:80GB:8, 24GB+:2, A100:4, 0.5, share 10GB, 1g.10gb or none."


def gpus_of(value: object) -> GpuRequest | None:
    """A request in the mini-language, or a number of GPUs."""
    if type(value) is float or type(value) is int:
        if not 0 <= value <= MAX_GPUS:
            raise Refusal(f"{shown(value)} GPUs cannot be asked for.", _GPU_MEND)
        value = f"{value:.6f}".rstrip("0") if type(value) is float and value < 1 and value else value
        if type(value) is float:
            if value != int(value):
                raise Refusal(f"{value:g} GPUs cannot be asked for: whole ones, or a share of one.", _GPU_MEND)
            value = int(value)
    elif value is not None and type(value) is not str:
        raise Refusal(f"{shown(value)} is not a GPU request.", _GPU_MEND)
    return _parsed_gpus(short(value, limit=200))


@lru_cache(maxsize=1_024)
def _parsed_gpus(value: str | int | None) -> GpuRequest | None:
    try:
        request = parse_gpus(value)
    except ValueError as error:
        sentence = str(error).partition("; write for")[0]
        raise Refusal(sentence[:1].upper() + sentence[1:] + ".", _GPU_MEND) from error
    if request is None:
        return None
    if (
        request.count > MAX_GPUS
        or max(request.memory_min_bytes, request.memory_max_bytes, request.share_bytes) > MAX_BYTES
    ):
        raise Refusal(f"{shown(value)} is more than there can be.", _GPU_MEND)
    if request.model:
        check_model(request.model)
    return request


def check_model(model: str) -> None:
    """Raises: Refusal that names the nearest models when there is no such GPU."""
    from tidemill import catalog

    if not catalog.known_model(model):
        near = ", ".join(catalog.nearest_names(model))
        raise Refusal(f"There is no GPU called {model}.", f"Did you mean {near}?" if near else _GPU_MEND)


def kind_of(value: object) -> Kind:
    """What sort of workload."""
    if value == "pipeline":
        raise Refusal("Pipelines are reserved, not available yet.", "Submit their steps as tasks.")
    if type(value) is not str or value not in Kind._value2member_map_:
        near = difflib.get_close_matches(str(value)[:40], ("task", "array", "dev", "service"), 1)
        kinds = "Kinds are task, array, dev and service."
        raise Refusal(f"{shown(value)} is not a kind.", f"Did you mean {near[0]}? {kinds}" if near else kinds)
    return Kind(value)


def workdir_of(value: object) -> str:
    """The digest of an uploaded folder."""
    text = text_of(value, limit=4_096)
    if not text:
        return ""
    if not (match := DIGEST.fullmatch(text)):
        raise Refusal(
            f"{shown(text)} is not the digest of an uploaded folder.",
            "Send it through the tidemill command or the Python client, which upload the folder,"
            " or PUT it to /v1/blobs/{sha256} first.",
        )
    return match[1]


def python_of(value: object) -> str:
    """A version of Python."""
    text = text_of(value, limit=100, mend=f'Put it in quotes: "{value}".')
    if text and not PYTHON.fullmatch(text):
        raise Refusal(f"{shown(text)} is not a version of Python.", 'Write for example "3.12".')
    return text


def package_of(value: object) -> str:
    """A package as pip takes it."""
    text = text_of(value, limit=4_096)
    if not text.strip() or "\n" in text or "\r" in text:
        raise Refusal(f"{shown(text)} is not a package.", 'Write for example "torch==2.9.0".')
    if text.lstrip().startswith("-"):
        raise Refusal(f"{shown(text)} is an option, not a package.", 'Write for example "torch==2.9.0".')
    return text


def image_of(value: object) -> str:
    """The name of a container image."""
    text = text_of(value, limit=1_024)
    if text and (text.startswith("-") or any(character.isspace() for character in text)):
        raise Refusal(f"{shown(text)} is not an image.", "Write for example docker.io/library/python:3.12.")
    return text


def secret_of(value: object) -> str:
    """The name of a secret."""
    text = text_of(value, limit=1_000)
    if not SECRET_NAME.fullmatch(text):
        raise Refusal(
            f"{shown(text)} is not the name of a secret.", "Use letters, digits and _, not beginning with a digit."
        )
    return text


def artifact_of(value: object) -> str:
    """The name of an artifact, with its version or without."""
    text = text_of(value, limit=1_000)
    if not ARTIFACT.fullmatch(text):
        raise Refusal(f"{shown(text)} is not an artifact.", "Write its name, or name:version.")
    return text


def dataset_of(value: object) -> str:
    """The name of a data set, with its version or without."""
    text = text_of(value, limit=1_000)
    if not DATASET.fullmatch(text):
        raise Refusal(f"{shown(text)} is not a data set.", "Write its name, or name:version: tidemill dataset list.")
    return text


def model_reference_of(value: object) -> str:
    """Which version of a model of the registry, as ``models:/NAME/VERSION`` and the like, or in short."""
    text = text_of(value, limit=1_000)
    try:
        parse_model_reference(text)
    except ValueError as error:
        mend = "Write models:/NAME/VERSION, models:/NAME/STAGE or models:/NAME@ALIAS; see tidemill model list."
        raise Refusal(f"{error}.", mend) from None
    return text


_SYSTEM: Final = (
    "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "tmp", "usr", "var"
)  # fmt: skip


def mount_of(value: object) -> str:
    """The path at which a worker finds something; not one that belongs to its system. Empty: not said."""
    text = text_of(value, limit=1_000)
    if not text:
        return ""
    if not text.startswith("/") or posixpath.normpath(text) != text or text.startswith("//") or text == "/":
        raise Refusal(f"{shown(text)} is not a whole path.", "Write for example /data, without a slash at its end.")
    if any(ord(character) < 32 or character in ':,"' for character in text):
        raise Refusal(f"{shown(text)} cannot be a path here.", "Leave out colons, commas, quotes, control characters.")
    if text.split("/")[1] in _SYSTEM:
        raise Refusal(f"{shown(text)} belongs to the worker's system.", "Write for example /data, /mnt/x or /srv/x.")
    return text


def mode_of(value: object) -> DataMode:
    """How a job gets a data set."""
    if type(value) is not str or value not in DataMode._value2member_map_:
        raise Refusal(f"{shown(value)} is not a mode.", "Modes are auto, copy and mount.")
    return DataMode(value)


PORT_MEND: Final = "Write a number from 1024 to 65535, a name such as http, or {name: http, port: 8000}."


def port_of(value: object) -> Port:
    """A port by name, number or both."""
    name: object
    number: object
    if type(value) is int:
        name, number = f"port-{value}"[:32], value
    elif type(value) is str:
        name, _, digits = value.partition(":")
        number = int(digits) if digits.isdecimal() and digits.isascii() and len(digits) <= 5 else digits or 0
        if not digits and value.isdecimal():
            raise Refusal(f"{shown(value)} is text.", "Write the number without quotes.")
    elif type(value) is dict:
        if unknown := set(value) - {"name", "port"}:
            raise Refusal(f"A port has no field {shown(sorted(map(str, unknown))[0])}.", PORT_MEND)
        number = value.get("port", 0)
        name = value.get("name", f"port-{number}"[:32])
    else:
        raise Refusal(f"{shown(value)} is not a port.", PORT_MEND)
    if type(name) is not str or not PORT_NAME.fullmatch(name):
        raise Refusal(f"{shown(name)} is not a name of a port.", "Use lower-case letters, digits, - or _.")
    if type(number) is not int or (number != 0 and not LOWEST_PORT <= number <= HIGHEST_PORT):
        raise Refusal(f"{shown(number)} is not a number of a port.", PORT_MEND)
    return Port(name=name, number=number)


def ports_of(value: object) -> tuple[Port, ...]:
    """Ports, each named once."""
    ports: tuple[Port, ...] = list_of(port_of, "ports")(
        value if type(value) in (list, tuple) or value is None else [value]
    )
    seen: set[str | int] = set()
    words: list[str | int] = [*(port.name for port in ports), *(port.number for port in ports if port.number)]
    for word in words:
        if word in seen:
            raise Refusal(f"{shown(word)} is there twice.", "Name each port once.")
        seen.add(word)
    return ports


def port_reference(value: object) -> str | int:
    """A port's name or number."""
    if type(value) is int:
        return whole_number(LOWEST_PORT, HIGHEST_PORT, "a number from 1024 to 65535, or a port's name")(value)
    return text_of(value, limit=100, mend="Write a port's name or number.")


def path_of(value: object) -> str:
    """The path of a readiness probe."""
    text = text_of(value, limit=2_048)
    if text and (not text.startswith("/") or any(ord(character) <= 32 for character in text)):
        raise Refusal(f"{shown(text)} is not a path.", "Write for example /health.")
    return text


def model_of(value: object) -> str:
    """The name of a model."""
    text = text_of(value, limit=200)
    if any(ord(character) < 32 for character in text):
        raise Refusal("It has control characters in it.", "Take them out.")
    return text


def affinity_of(value: object) -> Affinity:
    """What brings requests to the same replica."""
    if type(value) is not str or value not in Affinity._value2member_map_:
        raise Refusal(f"{shown(value)} is not an affinity.", "Write none, prefix or session.")
    return Affinity(value)


def fallback_of(value: object) -> tuple[str, ...]:
    """Names of models, each once."""
    mend = "Write the name of a model, or a list of names, in order."
    models: tuple[str, ...] = list_of(model_of, "names of models")([value] if type(value) is str else value)
    for number, model in enumerate(models):
        if not model:
            raise Refusal("A model has no empty name.", mend)
        if model in models[:number]:
            raise Refusal(f"{shown(model)} is there twice.", "Name each model once.")
    if len(models) > MAX_FALLBACKS:
        raise Refusal(f"It has {len(models)} models.", f"Write at most {MAX_FALLBACKS}.")
    return models


def hedge_of(value: object) -> int:
    """Nanoseconds after which a second replica is asked; 0 for never."""
    duration = duration_of(value)
    if duration > MAX_WAIT_NS:
        raise Refusal(f"{shown(value)} is longer than ten minutes.", "Write for example 200ms, or 0 for never.")
    return duration


def patience_of(value: object) -> int:
    """Nanoseconds, more than none and up to a day."""
    duration = grace_of(value)
    if not duration:
        raise Refusal("Nothing is answered in no time.", "Write for example 5s or 10m.")
    return duration


_PRICE_MEND: Final = "Write US dollars for a million tokens, such as 0.15."


def price_of(value: object) -> int:
    """Micro-USD for a million tokens."""
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{shown(value)} is not a price.", _PRICE_MEND)
    if not 0 <= value <= MAX_PRICE_MICRO / USD_MICRO:
        raise Refusal(f"{shown(value)} dollars for a million tokens cannot be asked for.", _PRICE_MEND)
    micro = round(value * USD_MICRO)
    if abs(micro - value * USD_MICRO) > 1e-3:
        raise Refusal(f"{shown(value)} dollars are not whole millionths of a dollar.", _PRICE_MEND)
    return micro


def retry_on_of(value: object) -> tuple[tuple[RetryOn, ...], tuple[int, ...]]:
    """Causes and exit codes."""
    items = list_of(lambda item: text_of(item, limit=100), "causes")([value] if type(value) is str else value)
    try:
        causes, codes = parse_retry_on(items)
    except ValueError as error:
        raise Refusal(
            f"{str(error).partition(';')[0]}.", "Causes are node_lost, preempted, error and exit:CODE."
        ) from error
    if any(not 1 <= code <= 255 for code in codes):
        raise Refusal("An exit code to retry on lies between 1 and 255.", "Write for example exit:75.")
    return causes, codes
