"""What single values have to be, whatever field they are in; what is wrong is a ``Refusal`` with the mend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Final

from pydantic_core import PydanticCustomError

from tidemill.model.spec import MAX_WAIT_NS
from tidemill.units import DAY_NS, SECOND_NS, parse_duration, parse_size

MAX_SCRIPT_BYTES: Final = 131_000
"""A script is one argument of a shell; Linux takes 128 KiB in one argument."""
MAX_DURATION_NS: Final = 3_660 * DAY_NS
MAX_BYTES: Final = 1 << 60
MAX_CPUS: Final = 1_000_000
MAX_GPUS: Final = 100_000
MAX_ITEMS: Final = 1_000
MAX_ERRORS: Final = 100

BUCKET_MEND: Final = (
    "Read a bucket as a data set (tidemill dataset add NAME s3://…, and data: in the workload); what a job writes to "
    "$TIDEMILL_OUTPUT_DIR is kept as its outputs."
)
NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
INPUT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
ARTIFACT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(:[0-9]{1,9})?", re.ASCII)
DATASET: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?(:[0-9]{1,9})?", re.ASCII)
DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)
PORT_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
PYTHON: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+@_-]{0,63}", re.ASCII)
_SLURM_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.@-]{0,254}", re.ASCII)
LABEL: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?", re.ASCII)
LOWEST_PORT, HIGHEST_PORT = 1024, 65_535


class Refusal(PydanticCustomError):
    """A value that a field cannot take, and the mend."""

    def __new__(cls, detail: str, mend: str = "") -> Refusal:
        """``detail`` is a sentence without the value; the value is reported beside it."""
        return super().__new__(cls, "refused", "{detail}", {"detail": detail, "mend": mend})


def shown(value: object) -> str:
    """A value as it is told of, clipped."""
    if type(value) is int and value.bit_length() > 256:
        return "A number of so many digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def text_of(value: object, *, limit: int = MAX_SCRIPT_BYTES, mend: str = "Write it as text, in quotes.") -> str:
    """Text of a bounded length. Raises: Refusal, as everything here."""
    if type(value) is not str:
        raise Refusal(f"{shown(value)} is not text.", mend)
    if len(value) > limit or (not value.isascii() and len(_utf8(value)) > limit):
        raise Refusal(f"It is longer than {limit:,} bytes.", "Put it in a file of the workdir.")
    if "\0" in value:
        raise Refusal("It has a NUL character in it.", "Take it out.")
    return value


def slurm_word_of(value: object) -> str:
    """A word that Slurm's commands take as the value of an option; empty for none."""
    text = text_of(value, limit=255)
    if text and not _SLURM_WORD.fullmatch(text):
        raise Refusal(f"{shown(text)} is no name of Slurm's.", "Write letters, digits, - _ + . or @, as sacctmgr does.")
    return text


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise Refusal("It is not valid Unicode text.", "Write it in UTF-8.") from None


def name_of(value: object) -> str:
    """A name of up to 63 letters, digits, - _ or ."""
    text = text_of(value, limit=1_000)
    if not NAME.fullmatch(text):
        raise Refusal(
            f"{shown(text)} is not a name.",
            "Use 1 to 63 letters, digits, - _ or ., beginning and ending with a letter or digit.",
        )
    return text


def volume_of(value: object) -> str:
    """The name of a volume. What is in a bucket is none."""
    if type(value) is str and "://" in value:
        raise Refusal(f"{shown(value)} is not the name of a volume: those are folders of a site.", BUCKET_MEND)
    return name_of(value)


def whole_number(low: int, high: int, what: str) -> Callable[[object], int]:
    """A check for a whole number in a range; ``what`` says the range."""

    def check(value: object) -> int:
        if type(value) is not int:
            raise Refusal(f"{shown(value)} is not a whole number.", f"Write {what}, without quotes.")
        if not low <= value <= high:
            raise Refusal(f"{shown(value)} is out of range.", f"Write {what}.")
        return value

    return check


def size_of(value: object) -> int:
    """Bytes."""
    try:
        size = parse_size(short(value))
    except ValueError as error:
        raise Refusal(f"{shown(value)} is not a size.", "Write for example 512MB, 16GB or 1.5TB.") from error
    if size > MAX_BYTES:
        raise Refusal(f"{shown(value)} is more than any machine has.", "Write for example 512MB, 16GB or 1.5TB.")
    return size


def duration_of(value: object) -> int:
    """Nanoseconds, up to ten years."""
    try:
        duration = parse_duration(short(value))
    except ValueError as error:
        raise Refusal(f"{shown(value)} is not a duration.", "Write for example 90s, 15m, 2h or 1h30m.") from error
    if duration > MAX_DURATION_NS:
        raise Refusal(f"{shown(value)} is longer than 10 years.", "Write for example 90s, 15m, 2h or 1h30m.")
    return duration


def grace_of(value: object) -> int:
    """Nanoseconds, up to a day."""
    duration = duration_of(value)
    if duration > DAY_NS:
        raise Refusal(f"{shown(value)} is longer than a day.", "Write for example 30s or 10m.")
    return duration


def period_of(value: object) -> int:
    """Nanoseconds, from 100 ms to a day."""
    duration = duration_of(value)
    if not SECOND_NS // 10 <= duration <= DAY_NS:
        raise Refusal(f"{shown(value)} is not between 100ms and a day.", "Write for example 2s or 1m.")
    return duration


def wait_of(value: object) -> int:
    """Nanoseconds, up to ten minutes; 0 for not at all."""
    duration = duration_of(value)
    if duration > MAX_WAIT_NS:
        raise Refusal(f"{shown(value)} is longer than ten minutes.", "Write for example 30s, or 0 to refuse at once.")
    return duration


def short(value: object, *, limit: int = 64) -> Any:
    """The value, unless it is a text that is too long to be looked at."""
    if isinstance(value, str) and len(value) > limit:
        raise Refusal(f"{shown(value)} is too long.", "Write for example 16GB, or 2h.")
    return value


def list_of(check: Callable[[object], Any], what: str) -> Callable[[object], tuple[Any, ...]]:
    """A check for a list of what another check takes."""

    def checked(value: object) -> tuple[Any, ...]:
        if value is None:
            return ()
        if type(value) is not list and type(value) is not tuple:
            raise Refusal(f"{shown(value)} is not a list.", f"Write a list of {what}.")
        if len(value) > MAX_ITEMS:
            raise Refusal(f"It has {len(value):,} items.", f"Write at most {MAX_ITEMS:,}.")
        return tuple([check(item) for item in value])

    return checked


def mapping_of(
    key: re.Pattern[str], check: Callable[[object], str], what: str, key_mend: str
) -> Callable[[object], tuple[tuple[str, str], ...]]:
    """A check for a mapping of names to what another check takes; it becomes pairs."""

    def checked(value: object) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if type(value) is not dict:
            raise Refusal(f"{shown(value)} is not a mapping.", f"Write {what}.")
        if len(value) > MAX_ITEMS:
            raise Refusal(f"It has {len(value):,} entries.", f"Write at most {MAX_ITEMS:,}.")
        for name in value:
            if type(name) is not str or not key.fullmatch(name):
                raise Refusal(f"{shown(name)} cannot be a name here.", key_mend)
        pairs = []
        for name, item in value.items():
            try:
                pairs.append((name, check(item)))
            except Refusal as refusal:
                context = refusal.context or {}
                raise Refusal(f"{name}: {context['detail']}", context["mend"]) from refusal
        return tuple(pairs)

    return checked


def scalar(value: object) -> str:
    """An environment variable's value: booleans as ``true`` and ``false``."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        if value.bit_length() > 256:
            raise Refusal("It is too large a number.", "Put it in quotes.")
        return str(value)
    if type(value) is float:
        if not math.isfinite(value):
            raise Refusal(f"{shown(value)} is not a finite number.", "Put it in quotes.")
        return repr(value)
    return text_of(value, mend="Write text, a number, true or false.")


def label_of(value: object) -> str:
    """A label's value as text."""
    text = scalar(value)
    if len(text) > 256:
        raise Refusal("It is longer than 256 characters.", "Write something shorter.")
    return text
