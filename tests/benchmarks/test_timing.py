"""Parts that run beside, and the spread of times."""

import os

import pytest

from benchmarks.timing import Aside, Spread, Times


def build(folder):
    return {"note": lambda: (folder / "pid").write_text(str(os.getpid())), "fail": lambda: 1 / 0}


def test_a_part_aside_runs_to_its_end_in_another_process(tmp_path, capfd):
    aside = Aside(build, tmp_path)
    for _ in range(2):
        aside.part("note")()
        assert int((tmp_path / "pid").read_text()) != os.getpid()
        (tmp_path / "pid").unlink()
    with pytest.raises(RuntimeError, match="runs 'fail' has ended"):
        aside.part("fail")()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_spread_and_ratios_are_of_rounds():
    times = Times([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 3.0}, {"a": 2.0, "b": 8.0}])
    assert times.seconds("a") == Spread(2.0, 1.5, 2.5)
    assert times.ratio("a", "b") == Spread(0.5, 0.375, 0.75)
    assert times.seconds("b").text(".2f", 10) == "30.00 (25.00 to 55.00)"
