"""Files, read and written: one that is replaced is seen old or new, never in part."""

import errno
import hashlib
import io
import math
import mmap
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from mis_jax.storage.paths import destination_path

# numpy reads an array's header with Python's parser, which in 3.11 raises SystemError ("AST
# constructor recursion depth mismatch") when two threads use it at once.
_PARSING = threading.Lock()
FULL = errno.ENOSPC, errno.EDQUOT  # a disk, or a user's share of one


def read_bytes(path: Path) -> bytes:
    """The content of a file; OSError where it cannot be read."""
    return path.read_bytes()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file; OSError, or UnicodeDecodeError (a ValueError) where it is none."""
    return path.read_text(encoding=encoding)


def open_binary(path: Path) -> BinaryIO:
    """A file opened for reading bytes."""
    return path.open("rb")


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """A file opened for reading text."""
    return path.open(encoding=encoding, newline=newline)


def refuse_lfs_pointer(path: Path) -> None:
    """ValueError for the lines that a Git repository cloned without LFS has in a file's place."""
    try:
        with path.open("rb") as file:
            begin = file.read(40)
    except OSError:
        return
    if not begin.startswith(b"version https://git-lfs.github.com/spec"):
        return
    raise ValueError(
        f"{path}: a pointer of Git LFS in the place of the file; run git lfs pull in "
        f"{path.parent}, or download the file itself"
    )


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes as memory that is read when it is looked at; ValueError for an empty one."""
    with open_binary(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def package_text(package: str, name: str) -> str:
    """A text file that is installed with a package of ours."""
    return package_files(package).joinpath(name).read_text(encoding="utf-8")


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it, where it is not."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file where nobody reads yet, as in a folder that is not in place."""
    path.write_text(text, encoding="utf-8")


def own_temporary_folder(name: str) -> Path:
    """A folder of this user below the system's temporary one; ValueError where others may write it.

    Anybody may make its name in a shared folder first and put other files into it.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValueError(f"{folder} is open to others")
    return folder


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made too."""
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def copy_file(source: Path, destination: Path) -> None:
    """Copy the content of a file."""
    shutil.copyfile(source, destination)


def remove_file(path: Path) -> None:
    """Remove a file, where it is."""
    path.unlink(missing_ok=True)


def move_aside(path: Path, away: Path) -> None:
    """Rename a file or folder within its disk."""
    path.rename(away)


def remove_empty_folder(folder: Path) -> None:
    """Remove a folder that holds nothing; OSError where it does."""
    folder.rmdir()


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours with all that is in it; what cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """Replace an .npz file; the disk may still lose it with the power."""
    with _replacing(path, durable=False) as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; OSError, ValueError, EOFError or BadZipFile for a damaged one."""
    with open_binary(path) as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_array(path: Path, array: np.ndarray) -> None:
    """Replace an .npy file; the disk may still lose it with the power."""
    with _replacing(path, durable=False) as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path) -> np.ndarray:
    """The array of an .npy file; OSError, ValueError or EOFError for a damaged one."""
    stream = io.BytesIO(read_bytes(path))
    with _PARSING:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{path}: not an array that write_array wrote")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
    if columns_first or dtype.hasobject:
        raise ValueError(f"{path}: not an array that write_array wrote")
    values = np.frombuffer(stream.getbuffer(), dtype, math.prod(shape), stream.tell())
    return values.reshape(shape)


@dataclass(frozen=True)
class Region:
    """Bytes that lie in a file from `offset` on; the file has `length` bytes in all."""

    path: Path
    offset: int
    size: int
    length: int


def region_digest(region: Region) -> str | None:
    """The sha256 of what lies there; None where the file is absent or has another length."""
    digest = hashlib.sha256()
    try:
        with region.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != region.length:
                return None
            file.seek(region.offset)
            left = region.size
            while left and (part := file.read(min(left, 8 * 2**20))):
                digest.update(part)
                left -= len(part)
    except FileNotFoundError:
        return None
    return None if left else digest.hexdigest()


def reserve_file(path: Path, size: int) -> None:
    """Make a file `size` bytes long, where it is not; OSError when the disk has no room."""
    with _writing(path) as descriptor:
        os.posix_fallocate(descriptor, 0, size)


def write_file(
    path: Path, content: bytes | memoryview, size: int | None = None, *, offset: int = 0
) -> None:
    """Write bytes at a place of a file, which gets zeros up to `size` behind them."""
    with _writing(path) as descriptor:
        view = memoryview(content)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        if size is not None and size != offset:
            os.truncate(descriptor, size)


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    """A descriptor; errors name the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        yield descriptor
    except OSError as error:
        room = ""
        if error.errno in FULL:
            room = f" ({shutil.disk_usage(path.parent).free / 1e9:.2f} GB are free)"
        raise OSError(error.errno, f"{path}: {error.strerror}{room}") from error
    finally:
        os.close(descriptor)


def os_error_text(error: OSError) -> str:
    """What the system says, and of which file: a line has no use for its number."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Where a link leads to it, that stays.

    It is on the disk when this returns. Without `durable` that is left to the system: after a
    loss of power the name may stand there with a part of the content.
    """
    with _replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` in a folder that is made; half a surrogate pair is written as its escape."""
    make_folder(destination_path(path.parent))
    replace_file(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def _replacing(path: Path, *, durable: bool) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends without an error."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
