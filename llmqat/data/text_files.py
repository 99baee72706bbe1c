"""Text of files: only regular files, in the encoding that they declare, and no byte replaced in silence.

A file is UTF-8 unless it opens with a byte order mark of UTF-16 or UTF-32 (PowerShell's ``>`` writes such files). It is
read as far as it went when it was opened: a file that something else keeps writing to has an end, too.
"""

import codecs
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmqat.errors import LlmqatError

# Byte order mark -> encoding; those of UTF-32 come first, for that of UTF-16 begins like one of them.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SPECIAL_FILES = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a character device",
    stat.S_ISBLK: "a block device",
    stat.S_ISSOCK: "a socket",
    stat.S_ISDIR: "a directory",
}
NUL_REMEDY = "not text, or UTF-16 without a byte order mark; convert it to UTF-8 (iconv -t UTF-8), or name another file"
CHUNK_BYTES = 1 << 20


class _Opened(io.RawIOBase):
    """The bytes that an open file had at first: what is appended later is not read."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.file, self.left = io.FileIO(descriptor), size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self.file.readinto(memoryview(buffer)[: self.left])
        self.left -= count or 0
        return count or 0

    def close(self) -> None:
        self.file.close()
        super().close()


def check_regular(path: Path, mode: int) -> None:
    """Refuse what is no regular file, for reading it may wait or go on for ever.

    Raises:
        LlmqatError: for a pipe, a device, a socket or a directory.
    """
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in SPECIAL_FILES.items() if test(mode)), "no regular file")
        raise LlmqatError(f"{path} is {kind}, and no dataset is read from it; copy what it holds to a file")


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, opened for reading as far as it goes now.

    Raises:
        LlmqatError: if it is missing, unreadable, empty, no regular file, or a Git LFS pointer to one.
    """
    try:
        check_regular(path, path.stat().st_mode)  # before opening: that of a pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise LlmqatError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error
    status = os.fstat(descriptor)
    file = io.BufferedReader(_Opened(descriptor, status.st_size), CHUNK_BYTES)
    try:
        check_regular(path, status.st_mode)
        if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise LlmqatError(
                f"{path} is a Git LFS pointer, not the file that it stands for; run git lfs pull beside it"
            )
    except (LlmqatError, OSError):
        file.close()
        raise
    return file


def encoding_of(start: bytes) -> str:
    """Encoding of a text that starts with these bytes."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        LlmqatError: see `open_regular`; if a byte is not of the encoding, or the text holds a NUL.
    """
    with open_regular(path) as file:
        content = file.read()
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        raise _undecodable(path, encoding, f"{content[at : at + 1].hex()} at offset {at}") from error
    if "\0" in text:
        raise LlmqatError(f"{path} holds a NUL at character {text.index(chr(0))}: {NUL_REMEDY}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _undecodable(path: Path, encoding: str, where: str) -> LlmqatError:
    name = encoding.removesuffix("-sig").upper()
    return LlmqatError(
        f"{path} is not {name}: byte 0x{where}; convert it to UTF-8 (iconv -f WINDOWS-1252 -t UTF-8, say), or mend it"
    )


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a file, with their ends. Bytes that are not UTF-8 become lone surrogates, for `decoding_error` to find.

    Raises:
        LlmqatError: see `open_regular`; if the file is UTF-16 or UTF-32 and a byte is not.
    """
    with open_regular(path) as file:
        start = file.peek(4)[:4]  # type: ignore[attr-defined]
        encoding = encoding_of(start)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        lines = io.TextIOWrapper(file, encoding, errors, newline="")
        try:
            yield from lines
        except UnicodeDecodeError as error:
            read_text(path)  # raises the same, with the offset in the file
            raise _undecodable(path, encoding, error.object[error.start : error.start + 1].hex()) from error


def decoding_error(line: str) -> str | None:
    """Why a line of `text_lines` is not text: its first byte that is not UTF-8; None if it is."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return f"byte 0x{ord(line[error.start]) - 0xDC00:02x} at character {error.start + 1} is not UTF-8"
    return None
