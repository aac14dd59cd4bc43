"""Damage to a checkpoint is noticed, wherever it is, and nothing is read beyond the file."""

import re
import zipfile

import numpy as np
import pytest
from rich.console import Console

from pointewa.errors import CheckpointError
from pointewa.runs.weights import restore
from pointewa.safe.torch_files import read_state
from pointewa.train.trainer import Trainer


def rezipped(path, change=lambda file, part, content: file.writestr(part, content), compression=zipfile.ZIP_STORED):
    """Write a checkpoint's parts anew, and return the size of all of them."""
    with zipfile.ZipFile(path) as file:
        parts = {part.filename: file.read(part) for part in file.infolist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for part, content in parts.items():
            change(file, part, content)
    return sum(map(len, parts.values()))


def test_parts_that_are_larger_than_the_file_are_refused(folder):
    path = folder / "last.ckpt"
    rezipped(path)
    assert read_state(path)["step"] == 20  # what follows is not refused for being written anew
    whole = rezipped(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < whole
    with pytest.raises(CheckpointError, match=r"last\.ckpt: cannot read the checkpoint.*compressed parts"):
        read_state(path)

    def repeated(file, part, content):
        file.writestr(part, content)
        file.filelist += 50 * file.filelist[-1:]  # the list at the end names it 51 times

    path.write_bytes((folder / "previous.ckpt").read_bytes())
    rezipped(path, repeated)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: cannot read the checkpoint.*larger than the file"):
        read_state(path)


@pytest.mark.hostile
def test_every_flipped_byte_of_the_content_is_noticed(run, folder):
    path, trainer = folder / "last.ckpt", run[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = []
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            name, extra = (int.from_bytes(whole[part.header_offset + at :][:2], "little") for at in (26, 28))
            start = part.header_offset + 30 + name + extra
            assert whole[start : start + part.file_size] == file.read(part)
            places += [start, start + part.file_size - 1, rng.integers(start, start + part.file_size)]
    assert len(places) > 600
    for number, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: ")):
            read_state(path)
        if number % 200 == 0:
            with pytest.warns(UserWarning, match=r"last\.ckpt: .*damaged.*taking previous\.ckpt"):
                resumed = Trainer(trainer.config, trainer.data, folder, Console(quiet=True))
            assert resumed.step == 18
            resumed.lock.release()
            assert (folder / "last.ckpt.damaged").read_bytes() == damaged


def test_both_checkpoints_damaged_give_one_error(run, folder):
    for name in ("last.ckpt", "previous.ckpt"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    uses = (restore, lambda folder: Trainer(run[0].config, run[0].data, folder, Console(quiet=True)))
    for use in uses:
        with pytest.raises(CheckpointError) as error:
            use(folder)
        assert f"{folder / 'last.ckpt'}: the checkpoint is damaged" in str(error.value)
        assert f"{folder / 'previous.ckpt'}: the checkpoint is damaged" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
