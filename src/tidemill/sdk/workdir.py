"""A folder as one archive that is the same for the same content, without what git would ignore.

The archive is a gzip-compressed tar: sorted, without owners or times, so that its SHA-256 names the
content and an unchanged folder is not sent again. Rules come from ``.gitignore`` and ``.tidemillignore``
files at every level (the latter win; the deepest rule that matches decides, the last one in its file), and
from the repository around the folder. ``.git``, ``.venv`` and ``__pycache__`` are never packed. Links that
stay inside are kept as links; one that leads out is refused, because it would lead elsewhere over there.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tidemill.errors import InvalidRequest, NotFound, TooLarge
from tidemill.units import format_size, parse_size

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

LIMIT_VARIABLE = "TIDEMILL_WORKDIR_LIMIT"
DEFAULT_LIMIT = "500MB"
NEVER = frozenset((".git", ".venv", "__pycache__"))
RULE_FILES = (".gitignore", ".tidemillignore")
_PIECE = 1024 * 1024

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Entry:
    """One thing to pack: ``name`` is its path inside the folder, ``target`` is set for links."""

    name: str
    path: str
    size: int
    mode: int
    target: str = ""


@dataclass(frozen=True)
class Packed:
    """A packed folder: the archive's SHA-256, its bytes, and how many things are in it."""

    digest: str
    size: int
    files: int


def pack(folder: Path, into: IO[bytes], *, progress: Progress | None = None) -> Packed:
    """The archive of ``folder``, written into ``into``, which is left at its beginning.

    Raises: NotFound, InvalidRequest for links that lead out and for unreadable files, TooLarge.
    """
    entries = scan(folder)
    total = sum(entry.size for entry in entries)
    limit = limit_bytes()
    if total > limit:
        raise _too_large(folder, entries, total, limit)
    digest = hashlib.sha256()
    done = 0
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=into, mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for entry in entries:
            _add(archive, entry)
            done += entry.size
            if progress is not None:
                progress(done, total)
    size = into.tell()
    into.seek(0)
    while piece := into.read(_PIECE):
        digest.update(piece)
    into.seek(0)
    return Packed(digest.hexdigest(), size, len(entries))


def limit_bytes() -> int:
    """The largest folder that is packed, in bytes before compression. Raises: InvalidRequest."""
    text = os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field=LIMIT_VARIABLE, value=text) from error


def scan(folder: Path) -> list[Entry]:
    """What would be packed, sorted by name. Raises: as ``pack``."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise NotFound(f"{folder} {problem}", field="workdir", mend="workdir is relative to the spec file's folder.")
    root = folder.resolve()
    found: list[Entry] = []
    _walk(root, "", _Rules.around(root), root, found)
    found.sort(key=lambda entry: entry.name)
    return found


def _walk(folder: Path, prefix: str, rules: _Rules, root: Path, found: list[Entry]) -> None:
    rules = rules.within(folder)
    try:
        children = list(os.scandir(folder))
    except OSError as error:
        raise _unreadable(prefix or str(folder), error) from error
    for child in children:
        name = prefix + child.name
        is_folder = child.is_dir(follow_symlinks=False)
        if child.name in NEVER or rules.ignore(child.path, is_folder=is_folder):
            continue
        if child.is_symlink():
            found.append(Entry(name, child.path, 0, 0o777, _target(root, child.path, name)))
        elif is_folder:
            found.append(Entry(name, child.path, 0, stat.S_IFDIR | 0o755))
            _walk(Path(child.path), name + "/", rules, root, found)
        elif child.is_file():
            about = child.stat()
            found.append(Entry(name, child.path, about.st_size, 0o755 if about.st_mode & 0o111 else 0o644))
        # sockets, pipes and devices have no content to send


def _target(root: Path, path: str, name: str) -> str:
    """Where a link leads, relative to it. Raises: InvalidRequest when that is outside the folder."""
    link = str(Path(path).readlink())
    parent = Path(path).parent
    lexical = os.path.normpath(parent / link)  # folds ".." as text, so that it does not look at what is there
    real = os.path.realpath(path)
    for where in (lexical, real):
        if os.path.commonpath((root, where)) != str(root):
            raise InvalidRequest(
                f"the link {name} leads out of the folder, to {link}",
                field="workdir",
                mend="Put a copy of what it leads to in the folder, or name the link in .tidemillignore.",
            )
    return os.path.relpath(lexical, parent)


def _add(archive: tarfile.TarFile, entry: Entry) -> None:
    about = tarfile.TarInfo(entry.name)
    about.mode = stat.S_IMODE(entry.mode)
    if entry.target:
        about.type, about.linkname = tarfile.SYMTYPE, entry.target
        archive.addfile(about)
    elif stat.S_ISDIR(entry.mode):
        about.type = tarfile.DIRTYPE
        archive.addfile(about)
    else:
        about.size = entry.size
        try:
            with Path(entry.path).open("rb") as content:
                archive.addfile(about, content)
        except OSError as error:
            raise _unreadable(entry.name, error) from error


def _unreadable(name: str, error: OSError) -> InvalidRequest:
    what = error.strerror or "changed while it was being packed"
    return InvalidRequest(
        f"cannot read {name}: {what}", field="workdir", mend="Name it in .tidemillignore if the job does not need it."
    )


def _too_large(folder: Path, entries: list[Entry], total: int, limit: int) -> TooLarge:
    largest = sorted(entries, key=lambda entry: (-entry.size, entry.name))[:5]
    listed = "".join(f"\n  {format_size(entry.size):>9}  {entry.name}" for entry in largest)
    return TooLarge(
        f"{folder} holds {format_size(total)}, more than the limit of {format_size(limit)}; the largest files:{listed}",
        field="workdir",
        mend=f"Add what the job does not need to .gitignore or .tidemillignore, or raise {LIMIT_VARIABLE}.",
        largest=[entry.name for entry in largest],
    )


@dataclass(frozen=True)
class _Rules:
    """The ignore rules that hold in one folder, outermost first: (the folder they stand in, the rules)."""

    levels: tuple[tuple[str, GitIgnoreSpec], ...] = ()

    @classmethod
    def around(cls, root: Path) -> _Rules:
        """The rules of the repository that ``root`` is a part of, unless they ignore ``root`` as a whole."""
        repository = next((parent for parent in root.parents if (parent / ".git").exists()), None)
        if repository is None or (root / ".git").exists():
            return cls()
        rules = cls()
        for parent in reversed([parent for parent in root.parents if parent.is_relative_to(repository)]):
            rules = rules.within(parent)
            below = parent / root.relative_to(parent).parts[0]
            if rules.ignore(str(below), is_folder=True):
                return cls()
        return rules

    def within(self, folder: Path) -> _Rules:
        """These rules and those that stand in ``folder``."""
        files = [folder / name for name in RULE_FILES]
        files = [file for file in files if file.is_file()]
        if not files:
            return self
        from pathspec import GitIgnoreSpec  # slow to import, and most folders have no rules

        lines = [line for file in files for line in file.read_text("utf-8", "replace").splitlines()]
        return _Rules((*self.levels, (str(folder), GitIgnoreSpec.from_lines(lines))))

    def ignore(self, path: str, *, is_folder: bool) -> bool:
        """Whether the deepest rule that matches says so."""
        for base, spec in reversed(self.levels):
            inside = os.path.relpath(path, base) + ("/" if is_folder else "")
            decided = spec.check_file(inside).include
            if decided is not None:
                return decided
        return False
