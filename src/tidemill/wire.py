"""What crosses the edge: workload specs as people write them, checked all at once, and written back again.

``read_spec`` turns a mapping into a ``WorkloadSpec`` and reports every mistake in it, each with the field as it was
written, its value and the mend. ``spec_to_json`` is its inverse. Types are strict: text is not taken for a number.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from tidemill.errors import InvalidSpec
from tidemill.model.resources import GpuRequest, Resources, parse_gpus
from tidemill.model.spec import (
    MAX_ARRAY,
    MAX_WORKERS,
    PRIORITY_RANGE,
    SECRET_NAME,
    Environment,
    Kind,
    Port,
    RetryOn,
    RetryPolicy,
    Service,
    WorkloadSpec,
    parse_retry_on,
)
from tidemill.units import DAY_NS, MILLI, SECOND_NS, parse_duration, parse_size

MAX_SCRIPT_BYTES: Final = 131_000
"""A script is one argument of a shell; Linux takes 128 KiB in one argument."""
MAX_DURATION_NS: Final = 3_660 * DAY_NS
MAX_BYTES: Final = 1 << 60
MAX_CPUS: Final = 1_000_000
MAX_GPUS: Final = 100_000
MAX_ITEMS: Final = 1_000
MAX_ERRORS: Final = 100

_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
_INPUT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_ARTIFACT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(:[0-9]{1,9})?", re.ASCII)
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)
_PORT_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
_PYTHON: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+@_-]{0,63}", re.ASCII)
_LABEL: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?", re.ASCII)
_LOWEST_PORT, _HIGHEST_PORT = 1024, 65_535


class Refusal(PydanticCustomError):
    """A value that a field cannot take, and the mend."""

    def __new__(cls, detail: str, mend: str = "") -> Refusal:
        """``detail`` is a sentence without the value; the value is reported beside it."""
        return super().__new__(cls, "refused", "{detail}", {"detail": detail, "mend": mend})


def _shown(value: object) -> str:
    if type(value) is int and value.bit_length() > 256:
        return "A number of so many digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _text(value: object, *, limit: int = MAX_SCRIPT_BYTES, mend: str = "Write it as text, in quotes.") -> str:
    if type(value) is not str:
        raise Refusal(f"{_shown(value)} is not text.", mend)
    if len(value) > limit or (not value.isascii() and len(_utf8(value)) > limit):
        raise Refusal(f"It is longer than {limit:,} bytes.", "Put it in a file of the workdir.")
    if "\0" in value:
        raise Refusal("It has a NUL character in it.", "Take it out.")
    return value


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise Refusal("It is not valid Unicode text.", "Write it in UTF-8.") from None


def _name(value: object) -> str:
    text = _text(value, limit=1_000)
    if not _NAME.fullmatch(text):
        raise Refusal(
            f"{_shown(text)} is not a name.",
            "Use 1 to 63 letters, digits, - _ or ., beginning and ending with a letter or digit.",
        )
    return text


def _whole(low: int, high: int, what: str) -> Callable[[object], int]:
    def check(value: object) -> int:
        if type(value) is not int:
            raise Refusal(f"{_shown(value)} is not a whole number.", f"Write {what}, without quotes.")
        if not low <= value <= high:
            raise Refusal(f"{_shown(value)} is out of range.", f"Write {what}.")
        return value

    return check


def _size(value: object) -> int:
    try:
        size = parse_size(_short(value))
    except ValueError as error:
        raise Refusal(f"{_shown(value)} is not a size.", "Write for example 512MB, 16GB or 1.5TB.") from error
    if size > MAX_BYTES:
        raise Refusal(f"{_shown(value)} is more than any machine has.", "Write for example 512MB, 16GB or 1.5TB.")
    return size


def _duration(value: object) -> int:
    try:
        duration = parse_duration(_short(value))
    except ValueError as error:
        raise Refusal(f"{_shown(value)} is not a duration.", "Write for example 90s, 15m, 2h or 1h30m.") from error
    if duration > MAX_DURATION_NS:
        raise Refusal(f"{_shown(value)} is longer than 10 years.", "Write for example 90s, 15m, 2h or 1h30m.")
    return duration


def _grace(value: object) -> int:
    duration = _duration(value)
    if duration > DAY_NS:
        raise Refusal(f"{_shown(value)} is longer than a day.", "Write for example 30s or 10m.")
    return duration


def _short(value: object) -> Any:
    if isinstance(value, str) and len(value) > 64:
        raise Refusal(f"{_shown(value)} is too long.", "Write for example 16GB, or 2h.")
    return value


def _cpus(value: object) -> int:
    """Milli-CPU."""
    if type(value) is not int and type(value) is not float:
        raise Refusal(f"{_shown(value)} is not a number of CPUs.", "Write for example 4, or 0.5 for half a core.")
    if not 0 < value <= MAX_CPUS or not (milli := round(value * MILLI)):
        raise Refusal(f"{_shown(value)} CPUs cannot be asked for.", "Write for example 4, or 0.5 for half a core.")
    return milli


_GPU_MEND: Final = "Write for example H100:80GB:8, 24GB+:2, A100:4, 0.5 or none."


def _gpus(value: object) -> GpuRequest | None:
    if type(value) is float or type(value) is int:
        if not 0 <= value <= MAX_GPUS:
            raise Refusal(f"{_shown(value)} GPUs cannot be asked for.", _GPU_MEND)
        value = f"{value:.6f}".rstrip("0") if type(value) is float and value < 1 and value else value
        if type(value) is float:
            if value != int(value):
                raise Refusal(f"{value:g} GPUs cannot be asked for: whole ones, or a share of one.", _GPU_MEND)
            value = int(value)
    elif value is not None and type(value) is not str:
        raise Refusal(f"{_shown(value)} is not a GPU request.", _GPU_MEND)
    return _parsed_gpus(_short(value))


@lru_cache(maxsize=1_024)
def _parsed_gpus(value: str | int | None) -> GpuRequest | None:
    try:
        request = parse_gpus(value)
    except ValueError as error:
        sentence = str(error).partition("; write for")[0]
        raise Refusal(sentence[:1].upper() + sentence[1:] + ".", _GPU_MEND) from error
    if request is None:
        return None
    if request.count > MAX_GPUS or max(request.memory_min_bytes, request.memory_max_bytes) > MAX_BYTES:
        raise Refusal(f"{_shown(value)} is more than there can be.", _GPU_MEND)
    if request.model:
        _check_model(request.model)
    return request


def _check_model(model: str) -> None:
    """Raises: Refusal that names the nearest models when there is no such GPU."""
    from tidemill import catalog

    if not catalog.known_model(model):
        near = ", ".join(catalog.nearest_names(model))
        raise Refusal(f"There is no GPU called {model}.", f"Did you mean {near}?" if near else _GPU_MEND)


def _kind(value: object) -> Kind:
    if value == "pipeline":
        raise Refusal("Pipelines are reserved, not available yet.", "Submit their steps as tasks.")
    if type(value) is not str or value not in Kind._value2member_map_:
        near = difflib.get_close_matches(str(value)[:40], ("task", "array", "dev", "service"), 1)
        kinds = "Kinds are task, array, dev and service."
        raise Refusal(f"{_shown(value)} is not a kind.", f"Did you mean {near[0]}? {kinds}" if near else kinds)
    return Kind(value)


def _workdir(value: object) -> str:
    text = _text(value, limit=4_096)
    if not text:
        return ""
    if not (match := _DIGEST.fullmatch(text)):
        raise Refusal(
            f"{_shown(text)} is not the digest of an uploaded folder.",
            "Send it through the tidemill command or the Python client, which upload the folder,"
            " or PUT it to /v1/blobs/{sha256} first.",
        )
    return match[1]


def _python(value: object) -> str:
    text = _text(value, limit=100, mend=f'Put it in quotes: "{value}".')
    if text and not _PYTHON.fullmatch(text):
        raise Refusal(f"{_shown(text)} is not a version of Python.", 'Write for example "3.12".')
    return text


def _package(value: object) -> str:
    text = _text(value, limit=4_096)
    if not text.strip() or "\n" in text or "\r" in text:
        raise Refusal(f"{_shown(text)} is not a package.", 'Write for example "torch==2.9.0".')
    if text.lstrip().startswith("-"):
        raise Refusal(f"{_shown(text)} is an option, not a package.", 'Write for example "torch==2.9.0".')
    return text


def _image(value: object) -> str:
    text = _text(value, limit=1_024)
    if text and (text.startswith("-") or any(character.isspace() for character in text)):
        raise Refusal(f"{_shown(text)} is not an image.", "Write for example docker.io/library/python:3.12.")
    return text


def _list_of(check: Callable[[object], Any], what: str) -> Callable[[object], tuple[Any, ...]]:
    def checked(value: object) -> tuple[Any, ...]:
        if value is None:
            return ()
        if type(value) is not list and type(value) is not tuple:
            raise Refusal(f"{_shown(value)} is not a list.", f"Write a list of {what}.")
        if len(value) > MAX_ITEMS:
            raise Refusal(f"It has {len(value):,} items.", f"Write at most {MAX_ITEMS:,}.")
        return tuple([check(item) for item in value])

    return checked


def _mapping_of(
    key: re.Pattern[str], check: Callable[[object], str], what: str, key_mend: str
) -> Callable[[object], tuple[tuple[str, str], ...]]:
    def checked(value: object) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if type(value) is not dict:
            raise Refusal(f"{_shown(value)} is not a mapping.", f"Write {what}.")
        if len(value) > MAX_ITEMS:
            raise Refusal(f"It has {len(value):,} entries.", f"Write at most {MAX_ITEMS:,}.")
        for name in value:
            if type(name) is not str or not key.fullmatch(name):
                raise Refusal(f"{_shown(name)} cannot be a name here.", key_mend)
        pairs = []
        for name, item in value.items():
            try:
                pairs.append((name, check(item)))
            except Refusal as refusal:
                context = refusal.context or {}
                raise Refusal(f"{name}: {context['detail']}", context["mend"]) from refusal
        return tuple(pairs)

    return checked


def _scalar(value: object) -> str:
    """An environment variable's value: booleans as ``true`` and ``false``."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        if value.bit_length() > 256:
            raise Refusal("It is too large a number.", "Put it in quotes.")
        return str(value)
    if type(value) is float:
        if not math.isfinite(value):
            raise Refusal(f"{_shown(value)} is not a finite number.", "Put it in quotes.")
        return repr(value)
    return _text(value, mend="Write text, a number, true or false.")


def _label(value: object) -> str:
    text = _scalar(value)
    if len(text) > 256:
        raise Refusal("It is longer than 256 characters.", "Write something shorter.")
    return text


def _secret(value: object) -> str:
    text = _text(value, limit=1_000)
    if not SECRET_NAME.fullmatch(text):
        raise Refusal(
            f"{_shown(text)} is not the name of a secret.", "Use letters, digits and _, not beginning with a digit."
        )
    return text


def _artifact(value: object) -> str:
    text = _text(value, limit=1_000)
    if not _ARTIFACT.fullmatch(text):
        raise Refusal(f"{_shown(text)} is not an artifact.", "Write its name, or name:version.")
    return text


_PORT_MEND: Final = "Write a number from 1024 to 65535, a name such as http, or {name: http, port: 8000}."


def _port(value: object) -> Port:
    name: object
    number: object
    if type(value) is int:
        name, number = f"port-{value}"[:32], value
    elif type(value) is str:
        name, _, digits = value.partition(":")
        number = int(digits) if digits.isdecimal() and digits.isascii() and len(digits) <= 5 else digits or 0
        if not digits and value.isdecimal():
            raise Refusal(f"{_shown(value)} is text.", "Write the number without quotes.")
    elif type(value) is dict:
        if unknown := set(value) - {"name", "port"}:
            raise Refusal(f"A port has no field {_shown(sorted(map(str, unknown))[0])}.", _PORT_MEND)
        number = value.get("port", 0)
        name = value.get("name", f"port-{number}"[:32])
    else:
        raise Refusal(f"{_shown(value)} is not a port.", _PORT_MEND)
    if type(name) is not str or not _PORT_NAME.fullmatch(name):
        raise Refusal(f"{_shown(name)} is not a name of a port.", "Use lower-case letters, digits, - or _.")
    if type(number) is not int or (number != 0 and not _LOWEST_PORT <= number <= _HIGHEST_PORT):
        raise Refusal(f"{_shown(number)} is not a number of a port.", _PORT_MEND)
    return Port(name=name, number=number)


def _ports(value: object) -> tuple[Port, ...]:
    ports: tuple[Port, ...] = _list_of(_port, "ports")(
        value if type(value) in (list, tuple) or value is None else [value]
    )
    seen: set[str | int] = set()
    words: list[str | int] = [*(port.name for port in ports), *(port.number for port in ports if port.number)]
    for word in words:
        if word in seen:
            raise Refusal(f"{_shown(word)} is there twice.", "Name each port once.")
        seen.add(word)
    return ports


def _port_reference(value: object) -> str | int:
    if type(value) is int:
        return _whole(_LOWEST_PORT, _HIGHEST_PORT, "a number from 1024 to 65535, or a port's name")(value)
    return _text(value, limit=100, mend="Write a port's name or number.")


def _path(value: object) -> str:
    text = _text(value, limit=2_048)
    if text and (not text.startswith("/") or any(ord(character) <= 32 for character in text)):
        raise Refusal(f"{_shown(text)} is not a path.", "Write for example /health.")
    return text


def _model(value: object) -> str:
    text = _text(value, limit=200)
    if any(ord(character) < 32 for character in text):
        raise Refusal("It has control characters in it.", "Take them out.")
    return text


def _retry_on(value: object) -> tuple[tuple[RetryOn, ...], tuple[int, ...]]:
    items = _list_of(lambda item: _text(item, limit=100), "causes")([value] if type(value) is str else value)
    try:
        causes, codes = parse_retry_on(items)
    except ValueError as error:
        raise Refusal(
            f"{str(error).partition(';')[0]}.", "Causes are node_lost, preempted, error and exit:CODE."
        ) from error
    if any(not 1 <= code <= 255 for code in codes):
        raise Refusal("An exit code to retry on lies between 1 and 255.", "Write for example exit:75.")
    return causes, codes


def _wrapped(field: str, *kinds: type) -> BeforeValidator:
    """A section that may be written as the value of its main field."""
    return BeforeValidator(lambda value: {field: value} if type(value) in kinds else value)


def _field(check: Callable[[object], Any], schema: Mapping[str, Any]) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(check), WithJsonSchema(dict(schema))


_TEXT: Final = {"type": "string"}
Section = TypeVar("Section", bound=BaseModel)
_SIZE_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["512MB", "16GB", "1.5TB"]}
_DURATION_SCHEMA: Final = {"type": ["string", "integer"], "examples": ["90s", "15m", "1h30m"]}


def _string_map(values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    return {"type": ["object", "null"], "additionalProperties": values, "propertyNames": {"pattern": pattern}}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


def _shared(section: Callable[[], Section]) -> Callable[[], Section]:
    """What gives one and the same section, with its defaults: sections cannot change."""
    made = section()
    return lambda: made


class ResourcesIn(_Section):
    """What each worker gets."""

    gpus: Annotated[
        GpuRequest | None,
        *_field(
            _gpus, {"type": ["string", "number", "null"], "examples": ["H100:80GB:8", "24GB+:2", "A100", 0.5, "none"]}
        ),
    ] = Field(default=None, description="GPUs: `[MODEL:][MEMORY:]COUNT`, a share of one such as `0.5`, or `none`.")
    cpus: Annotated[int, *_field(_cpus, {"type": "number", "exclusiveMinimum": 0, "examples": [4, 0.5]})] = Field(
        default=MILLI, description="CPU cores; fractions are allowed.", json_schema_extra={"default": 1}
    )
    memory: Annotated[int, *_field(_size, _SIZE_SCHEMA)] = Field(
        default=0, description="Memory; 0 leaves it unlimited."
    )
    disk: Annotated[int, *_field(_size, _SIZE_SCHEMA)] = Field(default=0, description="Scratch disk.")


class EnvironmentIn(_Section):
    """The job's own Python environment, built by uv once and kept."""

    python: Annotated[str, *_field(_python, {**_TEXT, "examples": ["3.12"]})] = Field(
        default="", description="Version of Python, in quotes; empty takes the node's own."
    )
    packages: Annotated[
        tuple[str, ...],
        *_field(
            _list_of(_package, "packages"), {"type": ["array", "null"], "items": _TEXT, "examples": [["torch==2.9.0"]]}
        ),
    ] = Field(default=(), description="Packages, as pip takes them.")


class ReadinessIn(_Section):
    """How it is told that a service's replica can be used."""

    path: Annotated[str, *_field(_path, {**_TEXT, "examples": ["/health"]})] = Field(
        default="", description="Path that answers 200 once it is ready; without it an open port is enough."
    )
    timeout: Annotated[int, *_field(_duration, _DURATION_SCHEMA)] = Field(
        default=120 * SECOND_NS, description="How long it may take.", json_schema_extra={"default": "2m"}
    )


class ServiceIn(_Section):
    """How a service is reached."""

    port: Annotated[
        str | int | None, *_field(_port_reference, {"type": ["string", "integer"], "examples": ["http", 8000]})
    ] = Field(default=None, description="Name or number of its port; the first of `ports`, or `http`, when left out.")
    readiness: Annotated[ReadinessIn, _wrapped("path", str)] = Field(
        default_factory=_shared(ReadinessIn), description="A path, or a section.", json_schema_extra={"default": {}}
    )
    replicas: Annotated[int, *_field(_whole(1, 64, "1 to 64"), {"type": "integer", "minimum": 1, "maximum": 64})] = (
        Field(default=1, description="How many run at a time.")
    )
    model: Annotated[str, *_field(_model, {**_TEXT, "examples": ["llama-3.1-8b"]})] = Field(
        default="", description="Name under which the gateway serves it; its own name when left out."
    )


class ArrayIn(_Section):
    """How many jobs an array has."""

    size: Annotated[
        int,
        *_field(_whole(1, MAX_ARRAY, f"1 to {MAX_ARRAY}"), {"type": "integer", "minimum": 1, "maximum": MAX_ARRAY}),
    ] = Field(description="Number of jobs; each finds its own in `TIDEMILL_ARRAY_INDEX`.")


_RETRY_ON: Final = ((RetryOn.NODE_LOST, RetryOn.PREEMPTED), ())


class RetryIn(_Section):
    """When a job that ended is tried again."""

    on: Annotated[
        tuple[tuple[RetryOn, ...], tuple[int, ...]],
        *_field(
            _retry_on,
            {
                "type": ["array", "string"],
                "items": {"type": "string", "pattern": "^(node_lost|preempted|error|exit:[0-9]{1,3})$"},
                "examples": [["node_lost", "preempted", "exit:75"]],
            },
        ),
    ] = Field(
        default_factory=lambda: _RETRY_ON,
        description="Causes: `node_lost`, `preempted`, `error`, `exit:CODE`.",
        json_schema_extra={"default": ["node_lost", "preempted"]},
    )
    max: Annotated[int, *_field(_whole(0, 1_000, "0 to 1000"), {"type": "integer", "minimum": 0, "maximum": 1_000})] = (
        Field(default=3, description="How often, at most.")
    )


class CheckpointIn(_Section):
    """What a worker gets before it is ended."""

    grace: Annotated[int, *_field(_grace, _DURATION_SCHEMA)] = Field(
        default=10 * SECOND_NS,
        description="Time between SIGTERM and SIGKILL, in which to save a checkpoint.",
        json_schema_extra={"default": "10s"},
    )


class WorkloadSpecIn(_Section):
    """A workload, as people write it."""

    kind: Annotated[Kind | None, *_field(_kind, {"type": "string", "enum": ["task", "array", "dev", "service"]})] = (
        Field(
            default=None,
            description="What sort of workload; `array` or `service` when there is that section, else `task`.",
            json_schema_extra={"default": "task"},
        )
    )
    name: Annotated[str, *_field(_name, {**_TEXT, "pattern": _NAME.pattern, "maxLength": 63})] = Field(
        default="", description="Its name; made from the file's name when left out."
    )
    project: Annotated[str, *_field(lambda value: _text(value, limit=100), _TEXT)] = Field(
        default="", description="Project whose quota it uses; the request's project when left out."
    )
    nodes: Annotated[
        int,
        *_field(
            _whole(1, MAX_WORKERS, f"1 to {MAX_WORKERS}"), {"type": "integer", "minimum": 1, "maximum": MAX_WORKERS}
        ),
    ] = Field(default=1, description="Workers of each job; they start together or not at all, and may share a machine.")
    resources: ResourcesIn = Field(
        default_factory=_shared(ResourcesIn), description="What each worker gets.", json_schema_extra={"default": {}}
    )
    env: EnvironmentIn | None = Field(default=None, description="Python environment; not together with `image`.")
    image: Annotated[str, *_field(_image, {**_TEXT, "examples": ["docker.io/library/python:3.12"]})] = Field(
        default="", description="Container image; not together with `env`."
    )
    workdir: Annotated[str, *_field(_workdir, {**_TEXT, "examples": ["."]})] = Field(
        default="", description="Folder that workers start in; the client uploads it and sends its SHA-256."
    )
    envs: Annotated[
        tuple[tuple[str, str], ...],
        *_field(
            _mapping_of(_VARIABLE, _scalar, "NAME: value", "Use letters, digits and _, not beginning with a digit."),
            _string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z_][A-Za-z0-9_]*$"),
        ),
    ] = Field(default=(), description="Environment variables.", json_schema_extra={"default": {}})
    secrets: Annotated[
        tuple[str, ...], *_field(_list_of(_secret, "names of secrets"), {"type": ["array", "null"], "items": _TEXT})
    ] = Field(default=(), description="Names of the project's secrets; each becomes an environment variable.")
    inputs: Annotated[
        tuple[tuple[str, str], ...],
        *_field(
            _mapping_of(_INPUT, _artifact, "name: artifact[:version]", "Use letters, digits, - _ or ."),
            _string_map(_TEXT, "^[A-Za-z0-9_][A-Za-z0-9._-]*$"),
        ),
    ] = Field(
        default=(),
        description="Artifacts, found read-only in `$TIDEMILL_INPUT_DIR/<name>`.",
        json_schema_extra={"default": {}, "examples": [{"model": "quickstart-gpt:2"}]},
    )
    setup: Annotated[str, *_field(_text, _TEXT)] = Field(
        default="", description="Shell script that prepares each worker."
    )
    run: Annotated[str, *_field(_text, {**_TEXT, "examples": ["python train.py"]})] = Field(
        default="", description="Shell script that each worker runs; `dev` workloads may leave it out."
    )
    ports: Annotated[
        tuple[Port, ...],
        *_field(
            _ports,
            {
                "type": ["array", "integer", "string", "null"],
                "items": {
                    "anyOf": [
                        {"type": "integer", "minimum": _LOWEST_PORT, "maximum": _HIGHEST_PORT},
                        {"type": "string"},
                        {
                            "type": "object",
                            "properties": {"name": _TEXT, "port": {"type": "integer"}},
                            "additionalProperties": False,
                        },
                    ]
                },
                "examples": [["http", 8000, "metrics:9100", {"name": "grpc", "port": 50051}]],
            },
        ),
    ] = Field(
        default=(), description="Ports: a name (`PORT` and `TIDEMILL_PORT_<NAME>` tell the number), a number, or both."
    )
    service: ServiceIn | None = Field(default=None, description="How a service is reached.")
    array: Annotated[ArrayIn | None, _wrapped("size", int)] = Field(default=None, description="A size, or a section.")
    max_duration: Annotated[int, *_field(_duration, _DURATION_SCHEMA)] = Field(
        default=0, description="How long an attempt may run; 0 for no limit."
    )
    retry: Annotated[RetryIn, _wrapped("max", int)] = Field(
        default_factory=_shared(RetryIn),
        description="A number of retries, or a section. A service without one is tried again whatever ended it.",
        json_schema_extra={"default": {}},
    )
    checkpoint: CheckpointIn = Field(
        default_factory=_shared(CheckpointIn),
        description="What a worker gets before it is ended.",
        json_schema_extra={"default": {}},
    )
    priority: Annotated[
        int,
        *_field(
            _whole(*PRIORITY_RANGE, f"{PRIORITY_RANGE[0]} to {PRIORITY_RANGE[1]}"),
            {"type": "integer", "minimum": PRIORITY_RANGE[0], "maximum": PRIORITY_RANGE[1]},
        ),
    ] = Field(default=0, description="Higher goes first within the project.")
    labels: Annotated[
        tuple[tuple[str, str], ...],
        *_field(
            _mapping_of(_LABEL, _label, "name: value", "Use letters, digits, - _ . or /."),
            _string_map({"type": ["string", "number", "boolean"]}, "^[A-Za-z0-9]"),
        ),
    ] = Field(default=(), description="Free words to find it by.", json_schema_extra={"default": {}})

    def to_model(self, default_name: str) -> WorkloadSpec:
        """The checked spec. Raises: InvalidSpec with every contradiction between fields."""
        if problems := list(_contradictions(self.model_fields_set, self)):
            raise _invalid(problems)
        kind = self.kind or _implied_kind(self.array is not None, self.service is not None)
        resources = self.resources
        ports, service = _reached(kind, self.ports, self.service)
        try:
            return WorkloadSpec(
                kind=kind,
                name=self.name or default_name,
                run=self.run,
                setup=self.setup,
                nodes=self.nodes,
                resources=_resources(resources.gpus, resources.cpus, resources.memory, resources.disk),
                environment=_environment(self.env.python, self.env.packages) if self.env is not None else None,
                image=self.image,
                workdir=self.workdir,
                envs=self.envs,
                secrets=self.secrets,
                inputs=self.inputs,
                ports=ports,
                service=service,
                array_size=self.array.size if self.array is not None else 1,
                max_duration_ns=self.max_duration,
                retry=(
                    _retry(self.retry.on[0], self.retry.on[1], self.retry.max)
                    if "retry" in self.model_fields_set
                    else default_retry(kind)
                ),
                checkpoint_grace_ns=self.checkpoint.grace,
                priority=self.priority,
                labels=self.labels,
            )
        except ValueError as error:
            raise InvalidSpec(f"{error}.") from error


_resources = lru_cache(maxsize=4_096)(
    lambda gpus, cpus, memory, disk: Resources(gpus=gpus, cpu_milli=cpus, memory_bytes=memory, disk_bytes=disk)
)
_environment = lru_cache(maxsize=1_024)(lambda python, packages: Environment(python=python, packages=packages))
_retry = lru_cache(maxsize=1_024)(lambda on, codes, most: RetryPolicy(on=on, exit_codes=codes, max=most))


def read_spec(given: object, default_name: str) -> WorkloadSpec:
    """The spec behind a mapping. Raises: InvalidSpec; ``data["errors"]`` lists every mistake.

    >>> read_spec({"run": "echo hello"}, "hello").name
    'hello'
    """
    return read_request(given).to_model(default_name)


def read_request(given: object) -> WorkloadSpecIn:
    """The spec as it was written, every field of it in order. Raises: as ``read_spec``."""
    try:
        return WorkloadSpecIn.model_validate(given)
    except ValidationError as error:
        raise _explain(error, given) from None


def _implied_kind(has_array: bool, has_service: bool) -> Kind:
    return Kind.ARRAY if has_array else Kind.SERVICE if has_service else Kind.TASK


def _contradictions(given: set[str], spec: Any) -> Iterator[dict[str, Any]]:
    """What is wrong between fields. ``spec`` has the fields as attributes; of a wrong one, only that it is given."""
    kind = spec.kind or _implied_kind(spec.array is not None, spec.service is not None)
    if spec.env is not None and spec.image:
        yield _problem("image", spec.image, "A job has an env or an image, not both.", "Leave one of them out.")
    if kind != "dev" and ("run" not in given or (type(spec.run) is str and not spec.run.strip())):
        yield _problem("run", "", f"A workload of kind {kind} needs run.", "Write the command to execute.")
    if spec.array is not None and kind != "array":
        yield _problem("array", None, f"A workload of kind {kind} has no array.", "Write kind: array.")
    if spec.array is None and kind == "array":
        yield _problem("array", None, "An array needs its size.", "Write for example array: 10.")
    if spec.service is not None and kind != "service":
        yield _problem("service", None, f"A workload of kind {kind} has no service.", "Write kind: service.")
    if isinstance(spec.service, ServiceIn) and type(spec.ports) is tuple:
        wanted = spec.service.port
        known = [port.name for port in spec.ports] + [port.number for port in spec.ports if port.number]
        if known and wanted is not None and wanted not in known:
            names = ", ".join(str(port.name) for port in spec.ports)
            yield _problem("service.port", wanted, f"{_shown(wanted)} is not among ports.", f"Ports are {names}.")
        elif not known and isinstance(wanted, str) and not _PORT_NAME.fullmatch(wanted):
            yield _problem("service.port", wanted, f"{_shown(wanted)} is not a name of a port.", _PORT_MEND)


def _reached(kind: Kind, ports: tuple[Port, ...], service: ServiceIn | None) -> tuple[tuple[Port, ...], Service | None]:
    """The ports and the service section, with the port that is meant when none is named."""
    if kind is not Kind.SERVICE:
        return ports, None
    section = service or ServiceIn()
    if not ports:
        ports = (_port(section.port if section.port is not None else "http"),)
    name = next((port.name for port in ports if section.port in (port.name, port.number)), ports[0].name)
    return ports, Service(
        port=name,
        readiness_path=section.readiness.path,
        readiness_timeout_ns=section.readiness.timeout,
        replicas=section.replicas,
        model=section.model,
    )


def _problem(field: str, value: object, detail: str, mend: str) -> dict[str, Any]:
    return {"field": field, "value": value, "detail": detail, "mend": mend}


def _invalid(problems: list[dict[str, Any]]) -> InvalidSpec:
    """One error for all problems; the first speaks for them."""
    first, rest = problems[0], len(problems) - 1
    more = "" if not rest else f" ({rest} more mistake{'s' if rest > 1 else ''} in this spec.)"
    return InvalidSpec(
        first["detail"] + more, field=first["field"], value=first["value"], mend=first["mend"], errors=problems
    )


class _AsWritten:
    """A spec that is partly wrong, for the checks between fields."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        value = self._given.get(name)
        if name == "kind":
            return value if type(value) is str else None
        return value


def _explain(error: ValidationError, given: object) -> InvalidSpec:
    problems = [_translated(item) for item in error.errors(include_url=False)[:MAX_ERRORS]]
    if type(given) is dict:
        spoken = {problem["field"].partition(".")[0] for problem in problems}
        problems += [
            problem
            for problem in _contradictions(set(given), _AsWritten(given))
            if problem["field"].partition(".")[0] not in spoken and "kind" not in spoken
        ]
    return _invalid(problems)


def _translated(item: Any) -> dict[str, Any]:
    field = ".".join(str(part) for part in item["loc"])
    value = item["input"]
    match item["type"]:
        case "refused":
            detail, mend = item["ctx"]["detail"], item["ctx"]["mend"]
        case "extra_forbidden":
            detail, mend, value = _unknown(item["loc"])
        case "missing":
            detail, mend, value = "It is needed.", f"Write {field}.", None
        case "model_type" | "dict_type" | "model_attributes_type":
            names = ", ".join(_fields_at(item["loc"]))
            detail, mend = f"{_shown(value)} is not a mapping.", f"Write a mapping with {names}."
        case _:
            detail, mend = f"{item['msg']}.", ""
    return _problem(field, _plain(value), detail, mend)


def _plain(value: object) -> Any:
    """The value as it can be shown in an answer."""
    if type(value) is str:
        return value if len(value) <= 200 else value[:200] + "…"
    if value is None or type(value) is bool or (type(value) is int and value.bit_length() <= 63):
        return value
    return value if type(value) is float and math.isfinite(value) else _shown(value)


_SECTIONS: Final[Mapping[tuple[str, ...], type[BaseModel]]] = {
    (): WorkloadSpecIn,
    ("resources",): ResourcesIn,
    ("env",): EnvironmentIn,
    ("service",): ServiceIn,
    ("service", "readiness"): ReadinessIn,
    ("array",): ArrayIn,
    ("retry",): RetryIn,
    ("checkpoint",): CheckpointIn,
}


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    section = _SECTIONS.get(tuple(str(part) for part in location))
    return list(section.model_fields) if section is not None else []


_MISPLACED: Final[Mapping[str, str]] = {
    name: ".".join((*place, name))
    for place, section in reversed(list(_SECTIONS.items()))
    for name in section.model_fields
}
_FOREIGN: Final = {
    "command": "run",
    "cmd": "run",
    "script": "run",
    "num_nodes": "nodes",
    "workers": "nodes",
    "gpu": "resources.gpus",
    "accelerators": "resources.gpus",
    "mem": "resources.memory",
    "cpu": "resources.cpus",
    "timeout": "max_duration",
    "time": "max_duration",
    "environment": "envs",
    "env_vars": "envs",
    "pip": "env.packages",
    "requirements": "env.packages",
    "docker": "image",
    "tags": "labels",
    "replicas": "service.replicas",
    "working_dir": "workdir",
}


def _unknown(location: tuple[Any, ...]) -> tuple[str, str, None]:
    """Detail and mend for a field that there is not: the nearest name, here or elsewhere."""
    name, here = str(location[-1]), _fields_at(location[:-1])
    where = f" in {'.'.join(str(part) for part in location[:-1])}" if location[:-1] else ""
    near = difflib.get_close_matches(name, here, 1)
    other = None if location[:-1] and near else _MISPLACED.get(name) or _FOREIGN.get(name.lower())
    meant = " or ".join(dict.fromkeys((*near, other) if other else near))
    mend = f"Did you mean {meant}?" if meant else f"Fields are {', '.join(here)}."
    return f"There is no field {_shown(name)}{where}.", mend, None


def spec_to_json(spec: WorkloadSpec) -> dict[str, Any]:
    """The mapping that ``read_spec`` turns into ``spec`` again; what is at its default is left out."""
    written: dict[str, Any] = {"kind": spec.kind.value, "name": spec.name}
    if spec.nodes != 1:
        written["nodes"] = spec.nodes
    if spec.resources != _DEFAULT_RESOURCES:
        written["resources"] = _resources_json(spec.resources)
    if spec.environment is not None:
        written["env"] = {"python": spec.environment.python, "packages": list(spec.environment.packages)}
    for name in ("image", "workdir", "setup", "run"):
        if value := getattr(spec, name):
            written[name] = value
    for name in ("envs", "inputs", "labels"):
        if pairs := getattr(spec, name):
            written[name] = dict(pairs)
    if spec.secrets:
        written["secrets"] = list(spec.secrets)
    if spec.ports:
        written["ports"] = [_port_json(port) for port in spec.ports]
    if spec.service is not None:
        written["service"] = {
            "port": spec.service.port,
            "readiness": {
                "path": spec.service.readiness_path,
                "timeout": _duration_json(spec.service.readiness_timeout_ns),
            },
            "replicas": spec.service.replicas,
            "model": spec.service.model,
        }
    if spec.kind is Kind.ARRAY:
        written["array"] = {"size": spec.array_size}
    if spec.max_duration_ns:
        written["max_duration"] = _duration_json(spec.max_duration_ns)
    if spec.retry != default_retry(spec.kind):
        causes = [cause.value for cause in spec.retry.on]
        written["retry"] = {"on": [*causes, *(f"exit:{code}" for code in spec.retry.exit_codes)], "max": spec.retry.max}
    if spec.checkpoint_grace_ns != _DEFAULT_GRACE_NS:
        written["checkpoint"] = {"grace": _duration_json(spec.checkpoint_grace_ns)}
    if spec.priority:
        written["priority"] = spec.priority
    return written


_DEFAULT_RESOURCES: Final = Resources()
_DEFAULT_RETRY: Final = RetryPolicy()
_SERVICE_RETRY: Final = RetryPolicy(on=tuple(RetryOn), max=1_000)
_DEFAULT_GRACE_NS: Final = 10 * SECOND_NS


def default_retry(kind: Kind) -> RetryPolicy:
    """When a job is tried again though its spec says nothing of it: a service always, others when they were lost."""
    return _SERVICE_RETRY if kind is Kind.SERVICE else _DEFAULT_RETRY


@lru_cache(maxsize=1_024)
def resources_json(resources: Resources) -> Mapping[str, Any]:
    """What a worker holds, as people write it; one shared mapping, to be read only."""
    return _resources_json(resources)


def _resources_json(resources: Resources) -> dict[str, Any]:
    whole, part = divmod(resources.cpu_milli, MILLI)
    written: dict[str, Any] = {
        "gpus": gpus_text(resources.gpus),
        "cpus": resources.cpu_milli / MILLI if part else whole,
    }
    if resources.memory_bytes:
        written["memory"] = _size_json(resources.memory_bytes)
    if resources.disk_bytes:
        written["disk"] = _size_json(resources.disk_bytes)
    return written


def gpus_text(request: GpuRequest | None) -> str:
    """The request in the mini-language, to the byte.

    >>> gpus_text(parse_gpus("24GB+:2"))
    '24GB+:2'
    """
    if request is None:
        return "none"
    low, high = request.memory_min_bytes, request.memory_max_bytes
    parts = [request.model] if request.model else []
    if low and low == high and request.model:
        parts.append(_size_text(low))
    elif high:
        parts.append(f"{_size_text(low)}..{_size_text(high)}")
    elif low:
        parts.append(f"{_size_text(low)}+")
    parts.append(str(request.count) if request.milli == MILLI else f"0.{request.milli:03}".rstrip("0"))
    return ":".join(parts)


def _size_json(size: int) -> str | int:
    return _size_text(size) if not size % 1024 else size


def _size_text(size: int) -> str:
    """A size with its unit, to the byte."""
    for unit, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
        if size and not size % 1024**power:
            return f"{size // 1024**power}{unit}B"
    whole, part = divmod(size, 1024)
    return f"{whole}.{part * 9_765_625:010}".rstrip("0").rstrip(".") + "KB"


def _duration_json(ns: int) -> str:
    for unit, factor in (("h", 3_600 * SECOND_NS), ("m", 60 * SECOND_NS), ("s", SECOND_NS), ("ms", 1_000_000)):
        if not ns % factor:
            return f"{ns // factor}{unit}"
    return f"{ns}ns"


def _port_json(port: Port) -> str | int | dict[str, Any]:
    if not port.number:
        return port.name
    return port.number if port.name == f"port-{port.number}" else {"name": port.name, "port": port.number}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a workload file, for editors."""
    schema = WorkloadSpecIn.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    short = {"array": "integer", "retry": "integer"}
    for name, plain in short.items():
        schema["properties"][name] = _or_plain(schema["properties"][name], plain)
    readiness = definitions["ServiceIn"]["properties"]
    readiness["readiness"] = _or_plain(readiness["readiness"], "string")
    for place, section in _SECTIONS.items():
        described = definitions[section.__name__] if place else schema
        for name, field in section.model_fields.items():
            described["properties"][name].setdefault("description", field.description)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://tidemill.dev/schemas/workload.json",
        **schema,
        "title": "Tidemill workload",
        "examples": [{"name": "hello", "run": "echo hello", "resources": {"gpus": "none", "cpus": 1}}],
        "$defs": definitions,
    }


def _or_plain(field: Mapping[str, Any], plain: str) -> dict[str, Any]:
    kept = {key: value for key, value in field.items() if key in ("default", "description")}
    choices = field.get("anyOf") or [{"$ref": field["$ref"]}]
    return {"anyOf": [*choices, {"type": plain}], **kept}


def spec_reference_markdown() -> str:
    """The table of every field of a workload file, for the documentation."""
    rows = ["| Field | Default | What it says |", "| --- | --- | --- |"]
    for place, section in _SECTIONS.items():
        for name, field in section.model_fields.items():
            path = (*place, name)
            extra = field.json_schema_extra
            default = extra.get("default") if isinstance(extra, dict) and "default" in extra else field.default
            is_plain = type(default) in (str, int, list) and default != ""
            shown = f"`{default}`" if is_plain else ""
            rows.append(f"| `{'.'.join(path)}` | {shown} | {field.description}{_examples(section, name)} |")
    return "\n".join(rows) + "\n"


def _examples(section: type[BaseModel], name: str) -> str:
    examples = section.model_json_schema()["properties"][name].get("examples")
    if not examples:
        return ""
    first = examples[0] if len(examples) == 1 else examples
    items = [str(item) for item in (first if type(first) is list else [first])]
    return " For example " + ", ".join(f"`{item}`" for item in items) + "."
