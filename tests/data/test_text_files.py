import codecs
import os
import socket

import pytest

from llmqat.data import text_files
from llmqat.data.corpus import load_corpus
from llmqat.data.text_files import decoding_error, encoding_of, open_regular, read_text, text_lines
from llmqat.errors import LlmqatError

TEXT = "".join(f"zeile {i}: größe, 日本, 😀\n" for i in range(100))
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-32": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.fixture
def file(tmp_path):
    """``file(content)``: the path of a file that holds it."""

    def make(content, name="a.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_byte_order_mark(file, encoding):
    content = ENCODINGS[encoding] + TEXT.encode(encoding)
    path = file(content)
    assert read_text(path) == TEXT
    assert "".join(text_lines(path)) == TEXT
    rows = "".join(f'{{"text": "{line[:-1]}"}}\n' for line in TEXT.splitlines(keepends=True))
    path = file(ENCODINGS[encoding] + rows.encode(encoding), "a.jsonl")
    assert "\n".join(load_corpus(str(path)).train) == TEXT[: len("\n".join(load_corpus(str(path)).train))]
    table = "n,text\n" + "".join(f'{n},"{line}"\n' for n, line in enumerate(TEXT.splitlines()))
    path = file(ENCODINGS[encoding] + table.encode(encoding), "a.csv")
    assert load_corpus(str(path)).train[0] == TEXT.splitlines()[0]
    listed = f"[{rows.replace(chr(10), ',').rstrip(',')}]"
    path = file(ENCODINGS[encoding] + listed.encode(encoding), "a.json")
    assert load_corpus(str(path)).train[0] == TEXT.splitlines()[0]


def test_encoding_of_what_no_mark_opens():
    assert [encoding_of(start) for start in (b"", b"\xff", b"a\xff\xfe")] == ["utf-8"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xe9def", r"a\.txt is not UTF-8: byte 0xe9 at offset 3; convert it to UTF-8"),
        (codecs.BOM_UTF8 + b"abc\xe9def", r"is not UTF-8: byte 0xe9 at offset 6;"),
        ("é".encode()[:1], r"is not UTF-8: byte 0xc3 at offset 0;"),
        (codecs.BOM_UTF16_LE + b"a\0b", r"is not UTF-16: byte 0x62 at offset 4;"),
        (codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0", r"is not UTF-16: byte 0x00 at offset 4;"),
        (codecs.BOM_UTF32_LE + b"a\0\0\0\0\0\x11\0", r"is not UTF-32: byte 0x00 at offset 8;"),
        (
            "plain".encode("utf-16-le"),
            r"holds a NUL at character 1: not text, or UTF-16 without a byte order mark; con",
        ),
        (b"abc\0", r"holds a NUL at character 3: not text"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(file, content, message):
    with pytest.raises(LlmqatError, match=message):
        load_corpus(str(file(content)))


def test_lines_of_utf_16_that_break_off(file):
    path = file(codecs.BOM_UTF16_LE + '{"text": "x"}\n'.encode("utf-16-le") * 1000 + b"a", "a.jsonl")
    with pytest.raises(LlmqatError, match=r"a\.jsonl is not UTF-16: byte 0x61 at offset 28002; convert it"):
        load_corpus(str(path))


def test_a_line_that_is_not_utf_8_is_a_bad_row(file, capsys):
    path = file(b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "c"}\n', "a.jsonl")
    assert "".join("".join(part) for part in vars(load_corpus(str(path))).values()) == "ac"
    told = "1 of 3 rows left out; the first one, a.jsonl line 2: byte 0xe9 at character 11 is not UTF-8"
    assert told in capsys.readouterr().err
    path = file(b"text,n\na,1\n\xe9,2\nc,3\n", "a.csv")
    assert "".join("".join(part) for part in vars(load_corpus(str(path))).values()) == "ac"
    assert decoding_error("plain é") is None


def test_line_ends_of_other_systems(file):
    assert read_text(file("a\r\nb\rc\n")) == "a\nb\nc\n"


def refused(path, message):
    with pytest.raises(LlmqatError, match=message):
        load_corpus(str(path))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv", "x.parquet", "x"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is a named pipe, and no dataset is read from it; copy what it holds to a file")
    (tmp_path / "y.txt").write_text(TEXT)
    if name != "x":
        refused(tmp_path, "is a named pipe")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
def test_a_device_and_a_socket_are_refused(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path / name, "is a character device, and no dataset")
    refused(tmp_path, "is a character device")
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / name))
        refused(tmp_path / name, "is a socket")


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    refused(tmp_path / "a.txt", "cannot read dataset .*a.txt.*[Ss]ymbolic links.*; check its name")
    refused(tmp_path, r"cannot read .*a\.txt: .*symbolic links; restore or remove it")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    refused(tmp_path, r"cannot read .*a\.txt: No such file.*; restore or remove it")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.txt"])
def test_names_that_no_file_can_have(name):
    refused(name, r"cannot read dataset .*; check its name")


def test_a_file_without_permission(file, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(text_files.os, "open", closed)
    refused(file("text"), r"cannot read .*a\.txt: Permission denied; check the file and its permissions")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_data(file, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    refused(file(pointer, name), r"is a Git LFS pointer, not the file that it stands for; run git lfs pull beside it")


def test_a_file_that_grows_is_read_as_far_as_it_went(file):
    path = file("one\ntwo\n")
    with open_regular(path) as opened:
        with path.open("a") as grown:
            grown.write("three\n")
        assert opened.read() == b"one\ntwo\n"
    lines = []
    for line in text_lines(path):
        with path.open("a") as grown:
            grown.write("more\n")
        lines.append(line)
    assert lines == ["one\n", "two\n", "three\n"]
