"""The file: a zip of plain members, the same bytes for the same members; read as what may be a stranger's.

    study.json                              jobs (script, overrides, stage, address); versions of packages and stages
    jobs/N/config.yaml                      the composed config of job N
    given/GROUP/NAME.yaml                   config files of a folder that was named with --config-dir
    artifacts/STAGE/ADDRESS/manifest.json   of every artifact concerned; with weights, its other files too
    report/                                 tables, figures, page
    requirements.lock, installed.txt        the environment

A reader takes out what it knows, within bounds. The names of all members are looked at before anything is written.
"""

import io
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from sdd.config import shared
from sdd.errors import UserError
from sdd.store import store
from sdd.untrusted import check_regular, printable

STUDY = "study.json"
FORMAT = 1
MOST_FILES = 20_000
LARGEST_DIRECTORY = 4 << 20
"""Bytes of the list of members, and of any single read."""
MOST_BYTES = 64 << 20
"""Of all that is taken out."""
LONGEST_NAME = 300
LIMITS = {
    r"study\.json": 4 << 20,
    r"jobs/\d{1,5}/config\.yaml": shared.LARGEST,
    r"given/[\w.@-]+(/[\w.@-]+)*\.yaml": shared.LARGEST,
    r"artifacts/[a-z]+/[0-9a-f]{16}/manifest\.json": 1 << 20,
    r"report/table\.json": 16 << 20,
}
"""What is taken out, and the most bytes of each."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, EOFError, ValueError)


def write_bundle(path: Path, members: Mapping[str, bytes | Path]) -> None:
    """Sorted, without times and owners, whole or not at all; a member is its bytes, or a file of an artifact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, content in sorted(members.items()):
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
                if isinstance(content, bytes):
                    archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=6)
                    continue
                entry.file_size = check_regular(content, str(content)).st_size  # whether it takes 64 bits
                with content.open("rb") as source, archive.open(entry, "w") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class _Bounded(io.FileIO):
    """A file of which no more is read at once than a list of members may take."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY:
            raise UserError(f"a list of members of more than {LARGEST_DIRECTORY:,} bytes")
        return super().read(LARGEST_DIRECTORY if size is None or size < 0 else size)


def take_out(path: Path, folder: Path) -> None:
    """Write what a bundle holds of the members in `LIMITS` into an empty folder."""
    check_regular(path, str(path))
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check(entries)
            left = MOST_BYTES
            for entry in entries:
                limit = next((limit for name, limit in LIMITS.items() if re.fullmatch(name, entry.filename)), None)
                if limit is not None:
                    left -= _take_out(archive, entry, folder / entry.filename, min(limit, left))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (*_BROKEN, OSError) as error:
        raise UserError(f"{path}: no bundle of a study ({(str(error).splitlines() or [''])[0]})") from None


def _check(entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_FILES:
        raise UserError(f"{len(entries):,} files, more than the {MOST_FILES:,} of a bundle")
    names: set[str] = set()
    for entry in entries:
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        shown = printable(name[:80])
        if not store.is_inner(name) or len(name) > LONGEST_NAME or name != entry.orig_filename:
            raise UserError(f"a file {shown} that does not stay in its folder; refused")
        if kind not in (0, stat.S_IFREG):
            raise UserError(f"{shown} is a link, or no file; refused")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{shown} is encrypted, or compressed in another way than a bundle's; refused")
        if name.casefold() in names:
            raise UserError(f"{shown} is there twice; refused")
        names.add(name.casefold())


def _take_out(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, at_most: int) -> int:
    """Write one member; -> its size, whatever the list of members says of it."""
    with archive.open(entry) as member:
        content = b"".join(iter(lambda: member.read(1 << 20), b"")) if entry.file_size <= at_most else b""
    if entry.file_size > at_most or len(content) > at_most:
        raise UserError(f"{entry.filename}: more than the {at_most:,} bytes that are read of it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return len(content)
