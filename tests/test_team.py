import torch

from llmqat.team import ALONE, Team, whole_team


def test_every_item_is_in_one_share():
    team = [Team(index, 3) for index in range(3)]
    assert [member.share(range(7)) for member in team] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [team[0].owner(item) for item in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_alone_nothing_is_exchanged(monkeypatch):
    named = [("x", torch.ones(2))]
    ALONE.wait()
    assert ALONE.all_of(3) == [3]
    assert ALONE.on_first("kept", 0) == "kept"
    assert ALONE.tensors_of(0, named, torch.device("cpu")) is named
    assert whole_team() == ALONE
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert whole_team() == Team(1, 2)
