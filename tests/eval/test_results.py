import json

from eval._results import begun, write

HEADER = {"environment": {"cpu": "x"}, "shape": (2, 3), "float": 1.5}


def test_a_sweep_goes_on_under_the_same_conditions(tmp_path, capsys):
    path = tmp_path / "new" / "sweep.json"
    result = begun(path, HEADER, "points", [])
    assert result == {"environment": {"cpu": "x"}, "shape": [2, 3], "float": 1.5, "points": []}
    assert not capsys.readouterr().out
    result["points"].append({"bits": 4})
    write(path, result)
    assert [file.name for file in path.parent.iterdir()] == ["sweep.json"]
    assert begun(path, HEADER, "points", []) == result
    assert "going on with the 1 parts" in capsys.readouterr().out


def test_other_conditions_start_anew_and_say_so(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    write(path, {**begun(path, HEADER, "points", []), "points": [1]})
    assert begun(path, HEADER | {"environment": {"cpu": "y"}}, "points", [])["points"] == []
    assert "is replaced: it was measured with another environment" in capsys.readouterr().out
    assert json.loads(path.read_text())["points"] == [1], "not before there is something to write"
