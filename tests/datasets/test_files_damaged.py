"""Single files damaged at random: points, or one error."""

import re

import file_forms
import numpy as np
import pypcd4
import pytest
from file_samples import CLOUDS, MESHES, POINTS, glb, pcd, with_json

from pointewa.datasets.files import SUFFIXES, read_cloud
from pointewa.errors import DataError

SEEDS = {suffix: [] for suffix in SUFFIXES}
for _name, _content in [
    *CLOUDS.items(),
    *MESHES.items(),
    ("ascii.pcd", pcd(POINTS, pypcd4.Encoding.ASCII)),
    ("scene.glb", glb()),
    *file_forms.CLOUDS.items(),
    *file_forms.CUBES.items(),
]:
    SEEDS["." + _name.split(".")[1].lower()].append(_content.encode() if isinstance(_content, str) else _content)

NUMBERS = [b"-1", b"0", b"1e39", b"-1e400", b"nan", b"inf", b"99999999999999999999", b"4294967295", b"x", b"1 2", b""]


def damaged(content, rng):
    """One to three kinds of damage."""
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(content) + 1))
        if rng.random() < 0.5:  # headers are short and matter
            start = min(start, int(rng.integers(400)))
        end = start + int(rng.integers(1, 40))
        match rng.integers(7):
            case 0:
                content = content[:start]
            case 1:
                content = (
                    content[:start] + bytes(255 - byte for byte in content[start : start + 1]) + content[start + 1 :]
                )
            case 2:
                content = content[:start] + rng.bytes(end - start) + content[start:]
            case 3:
                content = content[:start] + bytes(end - start) + content[end:]
            case 4:
                content = content[:start] + rng.bytes(end - start) + content[end:]
            case 5:
                content = content[:start] + content[end:]
            case 6:
                numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
                if numbers:
                    number = numbers[rng.integers(len(numbers) if rng.random() < 0.5 else min(len(numbers), 20))]
                    value = NUMBERS[rng.integers(len(NUMBERS))]
                    content = content[: number.start()] + value + content[number.end() :]
    return content


def damaged_file(suffix, rng):
    content = SEEDS[suffix][rng.integers(len(SEEDS[suffix]))]
    if suffix == ".glb" and rng.random() < 0.8:  # within its JSON, which would seldom parse otherwise
        end = 20 + int.from_bytes(content[12:16], "little")
        numbers = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?", content[20:end]))
        number = numbers[rng.integers(len(numbers))]
        value = [b"-1", b"0", b"1", b"2", b"7", b"1e39", b"1e400", b"99999999999", b"0.5", b"null", b"[]", b"5120"]
        tree = content[20:end][: number.start()] + value[rng.integers(12)] + content[20:end][number.end() :]
        return with_json(tree.decode(), content[end:])
    return damaged(content, rng)


@pytest.mark.hostile
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_gives_points_or_one_error(tmp_path, suffix, capfd):
    rng, path = np.random.default_rng(SUFFIXES.index(suffix)), tmp_path / f"a{suffix}"
    refused = []
    for _ in range(150):
        path.write_bytes(damaged_file(suffix, rng))
        try:
            points = read_cloud(path, 16).points
        except DataError as error:
            refused.append(str(error))
        else:
            assert points.dtype == np.float64
            assert points.shape == (len(points), 3)
            assert len(points) > 0
            assert np.isfinite(points).all()
    assert 30 <= len(refused) < 150
    assert all(line.startswith(f"{path}: ") and len(line.splitlines()) == 1 for line in refused)
    assert capfd.readouterr() == ("", "")
