"""Whether the locks of a folder keep out other machines too, as far as its mount says."""

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
OF_THIS_MACHINE = {
    "nfs": ("nolock", "local_lock=flock", "local_lock=all"),
    "nfs4": ("nolock", "local_lock=flock", "local_lock=all"),
    "lustre": ("localflock", "noflock"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "fuse.sshfs": ("",),
    "fuse.gcsfuse": ("",),
    "fuse.s3fs": ("",),
    "fuse.rclone": ("",),
}
"""By kind of file system, the options with which it asks no other machine for a lock; "" where it never does."""


def locks_only_here(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """The mount of a folder whose locks hold on this machine only, as 'nfs4 mounted with nolock'; None otherwise.

    The last mount of the longest path counts. What cannot be read says nothing, and not every file system tells.
    """
    try:
        lines = [line.split() for line in mounts.read_text(errors="replace").splitlines()]
    except OSError:
        return None
    place = folder.resolve()
    above = [line for line in lines if len(line) >= 4 and place.is_relative_to(_unescaped(line[1]))]
    if not above:
        return None
    _, _, kind, options, *_ = max(enumerate(above), key=lambda one: (len(one[1][1]), one[0]))[1]
    for option in OF_THIS_MACHINE.get(kind, ()):
        if not option or option in options.split(","):
            return f"{kind} mounted with {option}" if option else kind
    return None


def _unescaped(path: str) -> str:
    """Mounts write blanks and the like in octal."""
    return os.fsdecode(path.encode().decode("unicode_escape").encode("latin-1"))
