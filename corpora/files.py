"""Data files at one boundary: which files of a folder are data, how a text file is opened, and what its hash is.

A text file is UTF-8, with or without a byte order mark. Its line ends (\\n, \\r\\n, \\r) are read as \\n, as Python's
text mode does, and its hash does not depend on them either: a text that was saved on another system is the same text.
Line ends that JSON writes with a backslash are part of the text and stay.
"""

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from corpora.errors import UserError

__all__ = [
    "damaged",
    "data_files",
    "name_part",
    "open_text",
    "plain_file",
    "plain_name",
    "refuse_half_characters",
    "sha256_of_data",
    "sha256_of_file",
    "suffix_of",
    "version_of",
]

PACKED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
NOT_UNPACKED = (".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".br")
LARGEST_UNPACKED, LARGEST_RATIO = 1 << 28, 100  # bytes; text of a language packs to a fifth, a bomb to a thousandth
# Byte order marks of encodings that are not read. UTF-32's little-endian mark begins with that of UTF-16.
OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


def data_files(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder` that match a pattern, sorted, without those that are no data: hidden ones (a Mac leaves
    a ._NAME beside every NAME, hub clients a .cache folder) and cache-*.arrow, which `datasets.map` leaves."""
    return sorted(
        file
        for file in folder.glob(pattern)
        if file.is_file()
        and not file.name.startswith("cache-")
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def suffix_of(path: Path) -> str:
    """What a file holds by its name, in small letters: ".json" of A.JSON, and of a.json.gz, which is unpacked."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def plain_name(name: str) -> str:
    """A name that makes no path: what files say is never joined to a directory without it.

    Raises ValueError for separators, `.`, `..`, a leading dot, control characters, or more than 200 bytes.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("is no plain name of a file (no / or \\, no leading dot, nothing unprintable)")
    if len(name.encode(errors="replace")) > 200:
        raise ValueError("is longer than 200 bytes")
    return name


def name_part(text: str, longest: int = 160) -> str:
    """A readable part of a file's name, made of any words: a model's, a corpus', a file's.

    A dash stands for separators and for what cannot be printed; leading dots go. One of more than `longest` bytes is
    cut, and digits of a hash keep it apart from others.
    """
    plain = "".join("-" if sign in "/\\" or not sign.isprintable() else sign for sign in text).lstrip(".").encode()
    if len(plain) > longest:
        plain = plain[: longest - 9] + f"-{hashlib.sha256(plain).hexdigest()[:8]}".encode()
    return plain.decode(errors="ignore") or "-"


def plain_file(path: Path, what: str = "") -> Path:
    """The path itself, if a file that can be read more than once is there. what: it should be, for the message.

    Raises UserError if it is missing, a folder, or a pipe or device, which a reader might wait for without end; OSError
    where the system does not let it be looked at.
    """
    name = f"{what} {path}" if what else str(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} is missing") from None
    except ValueError:  # a NUL character
        raise UserError(f"{name!r} is no name of a file") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{name} is a folder; name a file of it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{name} is a pipe or device, not a file; save what it gives in a file")
    return path


def version_of(path: Path) -> tuple[int, ...]:
    """What is another one once a file was written again or replaced. Raises as `plain_file`."""
    status = plain_file(path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def open_text(path: Path, what: str = "") -> Iterator[IO[str]]:
    """A text file, open for reading; .gz and .zst are unpacked. what: it should be, for messages.

    Raises UserError, with the file's name, if it is missing, no file, damaged, packed in another way, or not UTF-8;
    also for what is found while the caller reads.
    """
    name = f"{what} {path}" if what else str(path)
    packing = path.suffix.lower()
    plain_file(path, what)
    if packing in NOT_UNPACKED:
        raise UserError(f"{name} is packed as {packing}, which is not read; unpack it, or pack it as .gz or .zst")
    try:
        with _unpacked(path, packing) as binary:
            start = binary.peek(4)[:4]
            encoding = next((code for mark, code in OTHER_MARKS.items() if start.startswith(mark)), None)
            if encoding is not None:
                raise UserError(f"{name} is text in {encoding}, which is not read; save it as UTF-8")
            with io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
                yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name} is not plain text in UTF-8 ({error.reason}, byte 0x{byte:02x}); save it as UTF-8"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(name, error) from None


def sha256_of_data(path: Path) -> str:
    """SHA-256 of a data file, in hexadecimal: of a text file as `open_text` reads it, of any other its bytes.

    A text file with plain \\n and no byte order mark has the hash of its bytes. A file that a process asks for again is
    read again only if it changed, here and in `sha256_of_file`. Raises as `plain_file`.
    """
    return _sha256_of_data(path, version_of(path))


@lru_cache(maxsize=10_000)  # a run names a text several times, and C4's file takes a second
def _sha256_of_data(path: Path, version: tuple[int, ...]) -> str:
    if path.suffix.lower() in (*PACKED, *TABLES, *NOT_UNPACKED):
        return sha256_of_file(path)
    digest = hashlib.sha256()
    # Latin-1 gives one character a byte and back, so that Python's text mode sees to the line ends of any text.
    with path.open(encoding="latin-1") as file:
        chunk = file.read(1 << 20).removeprefix("\xef\xbb\xbf")
        while chunk:
            digest.update(chunk.encode("latin-1"))
            chunk = file.read(1 << 20)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises as `plain_file`."""
    return _sha256_of_file(path, version_of(path))


@lru_cache(maxsize=10_000)
def _sha256_of_file(path: Path, version: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_half_characters(value: Any, where: str) -> None:
    """Raise UserError if a text, or one inside a JSON value, holds half of a character: JSON can write one (\\ud83d),
    but no tokenizer reads it."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            refuse_half_characters(part, where)
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        near = value[max(0, error.start - 30) : error.start].encode(errors="ignore").decode()
        raise UserError(
            f"{where} holds half of a character (\\u{ord(value[error.start]):04x}, behind {near!r}), which is no text; "
            "take it out, or write the whole character"
        ) from None


def damaged(what: object, reason: object) -> UserError:
    """The error for a file that cannot be read to its end: a text that is silently shorter gives another number."""
    return UserError(f"{what} is truncated or damaged ({reason}); mend it, or fetch it again")


def _unpacked(path: Path, packing: str) -> Any:
    """The bytes of a file as a buffered reader."""
    if packing == ".gz":
        return io.BufferedReader(_Bounded(path, gzip.open(path)), 1 << 16)
    if packing == ".zst":
        return io.BufferedReader(_Bounded(path, _ZstdFile(path)), 1 << 16)
    return path.open("rb")


class _Bounded(io.RawIOBase):
    """Unpacked bytes, until they are more than any text of this file's size could be: memory is not without end."""

    def __init__(self, path: Path, unpacked: Any) -> None:
        self._path = path
        self._unpacked = unpacked
        self._largest = max(LARGEST_UNPACKED, LARGEST_RATIO * path.stat().st_size)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._unpacked.readinto(buffer)
        self._count += size
        if self._count > self._largest:
            raise UserError(
                f"{self._path} unpacks to more than {self._largest >> 20} MB, over {LARGEST_RATIO} times its size, "
                "which no text does; unpack it and look what it is"
            )
        return size

    def close(self) -> None:
        self._unpacked.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a .zst file; one that ends inside a frame is an error, as it is for gzip."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._library = zstandard
        self._unpack = zstandard.ZstdDecompressor().decompressobj()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._unpack.unused_data or self._file.read(1 << 20)
            if self._unpack.eof:
                if not packed:
                    return 0
                self._unpack = self._library.ZstdDecompressor().decompressobj()  # the next frame
            elif not packed:
                raise EOFError("the file ends inside a zstd frame")
            try:
                self._ready = self._unpack.decompress(packed)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
