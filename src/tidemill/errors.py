"""The exception tree: what is broken or refused, with data in fields and a stable code.

An expected "no" of the scheduler is a ``Reason`` value, not an exception. ``kind`` groups codes the way a
caller reacts to them; the command line turns it into its exit status, the API into an HTTP status.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar


class ErrorKind(StrEnum):
    """How a caller should react; the number is the command line's exit status."""

    INVALID = "invalid"
    NOT_FOUND = "not_found"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    CONFLICT = "conflict"
    INFEASIBLE = "infeasible"
    TOO_LARGE = "too_large"
    UNAVAILABLE = "unavailable"
    STORAGE_FULL = "storage_full"
    INTERNAL = "internal"

    @property
    def exit_status(self) -> int:
        """The exit status of the command line for an error of this kind."""
        return _EXIT_STATUS[self]


_EXIT_STATUS = {
    ErrorKind.INTERNAL: 70,
    ErrorKind.INVALID: 2,
    ErrorKind.NOT_FOUND: 3,
    ErrorKind.UNAUTHORIZED: 4,
    ErrorKind.FORBIDDEN: 4,
    ErrorKind.CONFLICT: 5,
    ErrorKind.INFEASIBLE: 6,
    ErrorKind.TOO_LARGE: 2,
    ErrorKind.UNAVAILABLE: 7,
    ErrorKind.STORAGE_FULL: 8,
}


class TidemillError(Exception):
    """Something went wrong in Tidemill."""

    code: ClassVar[str] = "internal"
    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL

    def __init__(self, detail: str = "", *, field: str = "", value: Any = None, mend: str = "", **data: Any) -> None:
        """``field`` and ``value`` name what is wrong, ``mend`` says what to do, ``data`` is for programs."""
        self.detail = detail or (type(self).__doc__ or "").strip().splitlines()[0]
        self.field = field
        self.value = value
        self.mend = mend
        self.data = data
        super().__init__(self.detail)

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.detail}" + (f" {self.mend}" if self.mend else "")


class InvalidSpec(TidemillError):
    """The workload's spec cannot be accepted."""

    code = "invalid_spec"
    kind = ErrorKind.INVALID


class InvalidRequest(TidemillError):
    """The request cannot be understood."""

    code = "invalid_request"
    kind = ErrorKind.INVALID


class InvalidSetting(TidemillError):
    """A setting in the configuration cannot be used."""

    code = "invalid_setting"
    kind = ErrorKind.INVALID


class NotFound(TidemillError):
    """There is nothing by that name or id."""

    code = "not_found"
    kind = ErrorKind.NOT_FOUND


class Unauthorized(TidemillError):
    """A valid token is needed."""

    code = "unauthorized"
    kind = ErrorKind.UNAUTHORIZED


class Forbidden(TidemillError):
    """The token does not allow this."""

    code = "forbidden"
    kind = ErrorKind.FORBIDDEN


class Conflict(TidemillError):
    """The state of the thing does not allow this now."""

    code = "conflict"
    kind = ErrorKind.CONFLICT


class IdempotencyMismatch(Conflict):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_mismatch"
    kind = ErrorKind.INVALID


class Stale(Conflict):
    """The state changed since it was read."""

    code = "stale"


class Fenced(Conflict):
    """A newer attempt or leader holds the lease."""

    code = "fenced"


class Deposed(Fenced):
    """Another control plane leads since this one did; it is to be asked, and can be by the same request."""

    code = "deposed"
    kind = ErrorKind.UNAVAILABLE


class Infeasible(TidemillError):
    """The fleet can never run this as it is written."""

    code = "infeasible"
    kind = ErrorKind.INFEASIBLE


class TooLarge(TidemillError):
    """The content is over the limit."""

    code = "too_large"
    kind = ErrorKind.TOO_LARGE


class Unavailable(TidemillError):
    """The control plane cannot answer now; try again."""

    code = "unavailable"
    kind = ErrorKind.UNAVAILABLE


class StorageFull(TidemillError):
    """There is no space left on the disk."""

    code = "storage_full"
    kind = ErrorKind.STORAGE_FULL


class DamagedBackup(TidemillError):
    """The backup is not whole, or not as it was written."""

    code = "damaged_backup"
    kind = ErrorKind.INVALID


class EngineRefused(TidemillError):
    """The engine refused the command; the same command would be refused again."""

    code = "engine_refused"
    kind = ErrorKind.INVALID


class EngineLost(TidemillError):
    """The engine could not be reached; the command may be tried again."""

    code = "engine_lost"
    kind = ErrorKind.UNAVAILABLE


class CloudRefused(TidemillError):
    """The cloud refused what it was asked; the same request would be refused again."""

    code = "cloud_refused"
    kind = ErrorKind.INVALID


class CloudLost(TidemillError):
    """The cloud did not answer, or put us off; the request may be repeated under the same client token."""

    code = "cloud_lost"
    kind = ErrorKind.UNAVAILABLE


class IllegalTransition(TidemillError):
    """An event does not apply in this state."""

    code = "illegal_transition"
