"""How far work has come, told on standard error where that is no terminal."""

import pytest
from dgmr import progress as module
from dgmr.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress("work", 100) as advance:
        for clock[0] in (4, 8, 12, 16, 20):
            advance(20)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "work [############........] 60/100 images, 5 images/s, 8 s left"
    assert last == "work [####################] 100/100 images, 5 images/s, 0 s left"


def test_what_was_done_before_counts_for_no_speed(clock, capsys):
    with progress("work", 100, "steps", done=60) as advance:
        clock[0] = 10
        advance(20)
    assert capsys.readouterr().err == (
        "work [################....] 80/100 steps, 2 steps/s, 10 s left\n"
    )


def test_what_is_not_shown_says_nothing(clock, capsys):
    with progress("work", 10, shown=False) as advance:
        clock[0] = 100
        advance(10)
    assert capsys.readouterr().err == ""
