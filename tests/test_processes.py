import pytest

from llmqat.processes import is_first, process_count, process_index
from llmqat.progress import log, track

LAUNCHERS = {
    "alone": ({}, 0, 1),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4),
    "mpirun": ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, 2),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_which_process_this_is(launcher, monkeypatch):
    environment, index, count = LAUNCHERS[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_index(), process_count(), is_first()) == (index, count, index == 0)


def test_only_the_first_speaks(monkeypatch, capsys):
    monkeypatch.setattr("llmqat.progress.LINE_EVERY_SECONDS", 0.0)
    for rank, expected in (("1", ""), ("0", "hello\nwork: 1/2, 0 s, 0 s left\nwork: 2/2, 0 s\n")):
        monkeypatch.setenv("RANK", rank)
        log("hello")
        assert list(track("ab", "work", 2)) == ["a", "b"]
        assert capsys.readouterr().err == expected
