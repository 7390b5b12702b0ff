"""What the control planes of one installation have in common beside the database: a folder that all of them see.

Each home has links to it, so whatever reads a home finds everything there. What a home had of its own moves into the
folder once, which is how an installation with one control plane gets several.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

from tidemill.errors import Conflict, InvalidSetting

SHARED: Final = ("secret.key", "admin.token", "blobs", "logs")


def share(home: Path, folder: Path) -> None:
    """Have the home's pieces be those of the folder. Harmless to repeat.

    Raises: InvalidSetting when there is no such folder, or it cannot be written to; Conflict when both have a piece.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidSetting(
            "Control planes that stand in for each other share a folder, which has to be there and writable.",
            field="shared",
            value=str(folder),
            mend="Make it, on a file system that all of them mount.",
        )
    for name in SHARED:
        own, common = home / name, folder / name
        if own.is_symlink() and own.readlink() == common:
            continue
        if own.exists() and common.exists() and not own.is_symlink():
            raise Conflict(
                f"This home and the shared folder both have {name}: they are of two installations.",
                field="shared",
                value=str(folder),
                mend=f"Use an empty home, or move {own} away if it is the older one.",
            )
        if own.exists() and not own.is_symlink():
            _move(own, common)
        own.unlink(missing_ok=True)
        own.symlink_to(common)


def _move(own: Path, common: Path) -> None:
    """Move over, also to another file system, so that a crash leaves either all of it there or all of it here."""
    with contextlib.suppress(OSError):
        own.rename(common)
        return
    draft = common.with_name(f".{common.name}.new")
    if draft.is_dir():
        shutil.rmtree(draft)
    if own.is_dir():
        shutil.copytree(own, draft)
    else:
        shutil.copy2(own, draft)
    draft.rename(common)
    gone = own.with_name(f".{own.name}.moved")
    own.rename(gone)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
