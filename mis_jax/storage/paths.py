"""Where files lie: paths that may be read or written, and what a folder holds.

Everything in this package that is read or written goes through this folder, so that a bucket can
stand behind it; today a path is one of this machine's file system.
"""

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_COPY = {  # what brings a folder of that scheme here
    "gs": "gcloud storage cp -r {} .",
    "s3": "aws s3 cp --recursive {} .",
    "hf": "hf download OWNER/NAME --local-dir NAME",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: Path | str, what: str) -> Path:
    """A path of this machine's file system; ValueError names the scheme of another one.

    `Path` makes one slash of two, and a write would then go into a local folder called `gs:`.
    """
    if scheme := _SCHEME.match(str(path)):
        address = f"{scheme[1]}://{str(path)[scheme.end() :].lstrip('/')}"
        command = _COPY.get(scheme[1], "copy {} from there")
        raise ValueError(
            f"{what} {address}: {scheme[1]}:// paths are not supported; give a folder of this "
            f"machine or of a network disk: {command.format(address)}"
        )
    return Path(path)


def destination_path(path: Path | str, what: str = "destination") -> Path:
    """Where something to be written will lie: without `..`, and a link's target in its place.

    ValueError, before anything is written, for another file system's scheme, for links that lead
    round in a circle, and for a path below a file.
    """
    resolved = Path(os.path.realpath(local_path(path, what)))
    there = next(place for place in (resolved, *resolved.parents) if os.path.lexists(place))
    if there.is_symlink():  # any other one is resolved
        raise ValueError(f"{what} {path}: {there} is a link to itself; remove it")
    if there != resolved and not there.is_dir():
        raise ValueError(
            f"{what} {path}: {there} is a file, nothing can be written below it; choose another "
            "folder"
        )
    return resolved


def is_mount(folder: Path) -> bool:
    """Also of a bind mount within one disk, which `os.path.ismount` does not see."""
    if os.path.ismount(folder):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # no Linux
        return False
    escaped = re.sub(rb"[ \t\n\\]", lambda c: b"\\%03o" % c[0][0], os.fsencode(folder))
    return any(line.split()[4] == escaped for line in lines)


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints of a run's `checkpoints` folder; strays are passed over."""
    if not checkpoints.is_dir():
        return []
    names = (path.name for path in checkpoints.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether a folder's name is the number of a step."""
    return re.fullmatch(r"0|[1-9][0-9]*", name) is not None


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint of a run's `checkpoints` folder."""
    return max(complete_steps(checkpoints), default=None)


def is_inside(name: str) -> bool:
    """Whether a name out of a list that may have been downloaded stays below its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def files_below(folder: Path) -> list[str]:
    """The path of every file below a folder, relative to it, in their order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
