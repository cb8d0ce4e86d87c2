"""Damages of any file: its bytes, and what can stand in its place."""

import os
import random
from pathlib import Path

__all__ = ["Inapplicable", "content_of", "replaced"]

ROOT_USER = os.geteuid() == 0


class Inapplicable(Exception):
    """The damage does not fit the file (JSON keys of a text, tensors of a table)."""


def replaced(path: Path, content: bytes) -> None:
    """Write a new file in the place of the old one."""
    path.unlink()
    path.write_bytes(content)


def content_of(path: Path) -> bytes:
    content = path.read_bytes()
    if not content:
        raise Inapplicable
    return content


# Bytes ----------------------------------------------------------------------------------------------------------------


def truncate(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = content_of(path)
    keep = rng.choice([1, len(content) // 2, len(content) - 1, rng.randrange(len(content))])
    replaced(path, content[:keep])
    # The last line of JSON lines and texts may go without a trace, and so may its line end.
    return f"cut to {keep} of {len(content)} bytes", path.suffix not in (
        ".txt",
        ".jsonl",
        ".csv",
        ".jinja",
    ) and keep < len(content.rstrip())


def flip_bit(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = bytearray(content_of(path))
    # Headers decide more than the values behind them.
    place = rng.randrange(min(len(content), rng.choice([64, 2000, len(content)])))
    bit = rng.randrange(8)
    content[place] ^= 1 << bit
    replaced(path, bytes(content))
    return f"bit {bit} of byte {place} flipped", False


def zero_bytes(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    content = bytearray(content_of(path))
    start = rng.randrange(len(content))
    content[start : start + 100] = bytes(len(content[start : start + 100]))
    replaced(path, bytes(content))
    return f"100 bytes from {start} zeroed", False


def append(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    tail = rng.choice([b"\n", b"}", b"garbage", b"\x00" * 8, b"\xff\xfe", b"[[["])
    replaced(path, content_of(path) + tail)
    return f"{tail!r} appended", False


def empty(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    replaced(path, b"")
    return "emptied", path.suffix not in (".txt", ".jinja")


def other_kind(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    donor = rng.choice([other for other in others if other.suffix != path.suffix] or [Path(__file__)])
    replaced(path, donor.read_bytes())
    return f"swapped with {donor.name}", path.suffix not in (".txt", ".jinja")


def encoding(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    try:
        text = content_of(path).decode()
    except UnicodeDecodeError:
        raise Inapplicable from None
    name = rng.choice(["utf-16", "utf-8-sig", "utf-32"])
    replaced(path, text.encode(name))
    return f"in {name}", name != "utf-8-sig"


# What stands there instead --------------------------------------------------------------------------------------------


def missing(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    return "removed", False


def directory(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.mkdir()
    return "a directory", True


def dangling(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.symlink_to("nowhere")
    return "a dangling link", True


def loop(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself", True


def pipe(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    path.unlink()
    os.mkfifo(path)
    return "a pipe", True


def unreadable(path: Path, rng: random.Random, others: list[Path]) -> tuple[str, bool]:
    if ROOT_USER:
        raise Inapplicable
    path.chmod(0)
    return "unreadable", True
