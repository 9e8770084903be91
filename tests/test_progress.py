"""Progress in words, and the lines of a command that has no terminal."""

import time

import pytest

from rabbet.cli import terminal
from rabbet.progress import Pace, duration, worded


def test_what_is_done_of_what():
    assert worded("scoring", 64, 1024) == "scoring: 6 %, 64 of 1,024"
    assert worded("tuning: loss 0.1", 3, 4) == "tuning: 75 %, 3 of 4, loss 0.1"
    assert worded("solving layers: 3 of 20", 700, 1000) == "solving layers: 70 %, 3 of 20"
    assert worded("choosing", 0, 0) == "choosing: 0 %, 0 of 0"


def test_seconds_in_a_unit_that_is_easily_read():
    told = [duration(s) for s in (0.2, 2, 119, 120, 7199, 7200)]
    assert told == ["a second", "2 seconds", "119 seconds", "2 minutes", "120 minutes", "2 hours"]


def test_the_time_that_is_left_goes_by_what_was_done_since_the_stage_began():
    pace = Pace(40, 100, 1000.0)  # of which 40 were found in a folder
    assert pace.words(1030.0) == "30 seconds so far"
    pace.hear(60, 100, 1030.0)
    assert pace.words(1030.0) == "about 60 seconds left"
    assert pace.words(1070.0) == "about 20 seconds left"  # though nothing was heard since
    assert pace.words(1100.0) == "100 seconds so far"  # longer than was thought
    pace.hear(100, 100, 1105.0)
    assert pace.words(1112.0) == "7 seconds ago"
    pace.hear(0, 50, 1200.0)
    assert pace.words(1203.0) == "3 seconds so far"


@pytest.mark.filterwarnings("error")
def test_a_line_is_said_again_while_one_step_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    monkeypatch.setattr(terminal, "TICK", 0.01)
    told = ""
    with terminal.lines() as report:
        report("solving layers: 0 of 1, perhaps 2 minutes on one core", 0, 120_000)
        for _ in range(600):  # a minute at most
            told += capsys.readouterr().err
            if told.count("\n") >= 3:
                break
            time.sleep(0.1)
    first = "solving layers: 0 %, 0 of 1, perhaps 2 minutes on one core, a second so far"
    assert told.splitlines()[:3] == [first] * 3
