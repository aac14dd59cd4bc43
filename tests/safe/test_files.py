"""What goes wrong while a file is read: damage is the file's, a bug is ours."""

import json

import numpy as np
import pytest

from pointewa.datasets import files
from pointewa.errors import DataError, is_bug
from pointewa.ops import unit_sphere
from pointewa.safe.files import reading


def caught(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "bug"),
    [
        (caught(unit_sphere, None), True),  # None has no attribute mean
        (caught(json.loads, None), False),  # a TypeError that json raises, as on a damaged file
        (caught(json.loads, "{"), False),
        (caught(lambda: {}["a"]), False),
        (TypeError("never raised"), False),
    ],
)
def test_what_a_bug_is(error, bug):
    assert is_bug(error) == bug


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), TypeError("odd"), MemoryError("odd")])
def test_whatever_a_parser_raises_becomes_one_line(tmp_path, error):
    message = r"a\.bin: cannot be read as X .*odd.*damaged or incomplete"
    with pytest.raises(DataError, match=message) as raised, reading(tmp_path / "a.bin", "X"):
        raise error
    assert raised.value.__cause__ is error


def test_a_bug_in_a_reader_shows_itself(tmp_path, monkeypatch):
    np.savetxt(tmp_path / "a.xyz", np.random.default_rng(0).random((9, 3)))
    assert files.read_points(tmp_path / "a.xyz", 9).shape == (9, 3)
    monkeypatch.setattr(files, "_check", None)
    with pytest.raises(TypeError, match="not callable"):
        files.read_points(tmp_path / "a.xyz", 9)
