"""The folder of scores holds those of this run and no other."""

import pytest
from dgmr.evaluate.gather import gather


def test_scores_are_copied_and_older_ones_gone(tmp_path):
    for name in ("a", "b", "speed"):
        (tmp_path / f"{name}-key.json").write_text(name)
    output = tmp_path / "evaluate"
    output.mkdir()
    for name in ("old.json", "0123456789ab.stamp"):
        (output / name).touch()
    scores = {"teacher": tmp_path / "a-key.json", "pruned": tmp_path / "b-key.json"}
    gather(scores, tmp_path / "speed-key.json", output)
    found = {path.name: path.read_text() for path in output.iterdir()}
    assert found == {"teacher.json": "a", "pruned.json": "b", "speed.json": "speed"}


def test_missing_score_leaves_what_was_there(tmp_path):
    output = tmp_path / "evaluate"
    output.mkdir()
    (output / "0123456789ab.stamp").touch()
    with pytest.raises(FileNotFoundError):
        gather({"teacher": tmp_path / "none.json"}, tmp_path / "none.json", output)
    assert [path.name for path in output.iterdir()] == ["0123456789ab.stamp"]
