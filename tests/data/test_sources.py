import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llmqat.data.rows import Unreadable
from llmqat.data.sources import READERS
from llmqat.data.text_files import NUL_REMEDY
from llmqat.errors import LlmqatError


@pytest.fixture
def read(tmp_path):
    """``read(name, content)``: where the rows of a file stand, and what they hold."""

    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(place.removeprefix(f"{name} "), row) for place, row in READERS[path.suffix](path)]

    return make


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', ["line 1", "line 3"]),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}', ["line 1", "line 2"]),
        ("a.json", '[{"a": 1},\n {"a": 2}]', ["row 1", "row 2"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["line 1", "line 2"]),
        ("a.json", '{"version": "1", "data": [{"a": 1}, {"a": 2}]}', ["row 1", "row 2"]),
        ("a.csv", "a\n1\n2\n", ["line 2", "line 3"]),
        ("a.csv", "\n\na\n\n1\n\n2\n", ["line 5", "line 7"]),
        ("a.jsonl", '{"a": 1, "n": ' + "9" * 5000 + '}\n{"a": 2, "n": NaN}', ["line 1", "line 2"]),
    ],
)
def test_rows_and_where_they_stand(read, name, content, places):
    rows = read(name, content)
    assert [place for place, _ in rows] == places
    assert [int(row["a"]) for _, row in rows] == [1, 2]


def test_a_json_file_may_be_one_object(read):
    conversation = {"messages": [{"role": "user", "content": "x"}], "id": [1, 2]}
    assert read("a.json", json.dumps(conversation)) == [("row 1", conversation)]


@pytest.mark.parametrize(
    ("name", "content", "good", "broken"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', 1, [("line 2", "not JSON (Expecting value at column 6)")]),
        (
            "a.jsonl",
            '7\n{"a": 1}\nx',
            1,
            [("line 1", "not an object"), ("line 3", "not JSON (Expecting value at column 1)")],
        ),
        ("a.json", '[7, {"a": 1}]', 1, [("row 1", "not an object")]),
        ("a.json", "7", 0, [("row 1", "not an object")]),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, 1, [("line 2", "not JSON that can be read (nested too deeply)")]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', 1, [("line 2", "byte 0xe9 at character 8 is not UTF-8")]),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": "\0"}',
            1,
            [("line 2", f"a NUL: {NUL_REMEDY}")],
        ),
        ("a.csv", b"a,b\n1,2\n\xe9,4\n", 1, [("line 3", "byte 0xe9 at character 1 is not UTF-8")]),
        (
            "a.csv",
            'a,b\n1,2\n3,"x\n5,6\n7,8\n',
            1,
            [(f"line {n}", "not a row of a table (unexpected end of data)") for n in (3, 4, 5)],
        ),
        (
            "a.csv",
            'a,b\n3,"x"y\n1,2\n',
            1,
            [("line 2", "not a row of a table (',' expected after '\"')")],
        ),
        ("a.csv", "a,b\n1,2\n1\n", 1, [("line 3", "1 cells under 2 columns")]),
        ("a.csv", "a,b\n1,2,3,4\n", 0, [("line 2", "4 cells under 2 columns")]),
    ],
)
def test_broken_rows_say_why(read, name, content, good, broken):
    rows = read(name, content)
    assert [row for row in rows if isinstance(row[1], str)] == broken
    assert len(rows) == good + len(broken)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_columns_of_one_name_are_refused(read, tmp_path, name):
    content = "text,text\n1,2\n"
    if name == "a.parquet":
        table = pyarrow.Table.from_arrays([pyarrow.array(["1"]), pyarrow.array(["2"])], names=["text", "text"])
        pyarrow.parquet.write_table(table, tmp_path / "real.parquet")
        content = (tmp_path / "real.parquet").read_bytes()
    with pytest.raises(LlmqatError, match=rf"{name} has two columns named 'text'; rename one of them"):
        read(name, content)


def test_one_conversation_in_a_json_file_is_one_row(read):
    conversation = {"messages": [{"role": "user", "content": "x"}]}
    assert read("a.json", json.dumps(conversation)) == [("row 1", conversation)]


def test_values_that_parquet_holds_and_python_cannot(read, tmp_path):
    """A column that nothing is read from must not end the run; a text is left out, and told why."""
    late = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xe9b")
    )
    table = pyarrow.Table.from_arrays([late, broken], names=["at", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "real.parquet")
    (_, first), (_, second) = read("a.parquet", (tmp_path / "real.parquet").read_bytes())
    assert isinstance(first["at"], Unreadable)
    assert "can't decode byte 0xe9" in first["text"].reason
    assert second["text"] == "b"


def test_quotes_line_breaks_and_long_cells_of_a_table(read):
    rows = read("a.csv", 'a,b\n"x, ""y""\nz",' + "b" * 300_000 + "\n")
    assert rows[0][1] == {"a": 'x, "y"\nz', "b": "b" * 300_000}


def test_parquet_keeps_nested_values(read, tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "real.parquet"))
    assert read("a.parquet", (tmp_path / "real.parquet").read_bytes()) == [
        (f"row {i + 1}", row) for i, row in enumerate(rows)
    ]
    with pytest.raises(LlmqatError, match=r"cannot parse .*a\.parquet: .*; copy or download it again"):
        read("a.parquet", b"PAR1 half")
