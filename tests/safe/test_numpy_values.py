"""NumPy's scalars and arrays in checkpoints, as Point-BERT's hold them: read as values, and nothing else is."""

import codecs
import pickle

import numpy as np
import pytest
import torch

from pointewa.errors import CheckpointError
from pointewa.runs.weights import read_weights
from pointewa.safe.torch_files import read_state
from tests.runs.mutations import bounded

SCALARS = {
    "acc": np.float64(92.7), "half": np.float16(0.5), "single": np.float32(1.5), "epoch": np.int64(-3),
    "byte": np.uint8(7), "other byte": np.uint8(7), "best": np.bool_(True), "complex": np.complex64(1 + 2j),
    "swapped": np.array([2.5], ">f8")[0], "name": np.str_("bed"), "bytes": np.bytes_(b"ab\xff"), "none": np.str_(""),
}  # fmt: skip
ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "single": np.float32([1, 2]), "truth": np.array([True, False]), "names": np.array(["chair", "bed"]),
    "none": np.zeros((0, 3)), "zero": np.array(5.0), "long": np.arange(1000),
}  # fmt: skip


def saved(path, value, zipped=True, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def renamed(path, old, new):
    """The same file of the format before torch 1.6, its pickle as another version of NumPy would have written it."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_scalars_become_numbers(tmp_path, zipped):
    path = saved(tmp_path / "a.pth", {"base_model": {"w": torch.ones(2)}, "metrics": SCALARS}, zipped)
    with pytest.raises(pickle.UnpicklingError, match="numpy"):  # so it is with torch's own list
        torch.load(path, weights_only=True)
    found = read_state(path)
    assert torch.equal(found["base_model"]["w"], torch.ones(2))
    assert found["metrics"] == {name: value.item() for name, value in SCALARS.items()}
    assert {name: type(value) for name, value in found["metrics"].items()} == {
        name: type(value.item()) for name, value in SCALARS.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_arrays_stay_arrays(tmp_path, zipped):
    found = read_state(saved(tmp_path / "a.pth", ARRAYS, zipped))
    assert list(found) == list(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, strict=True)
        assert found[name].flags.f_contiguous == value.flags.f_contiguous


def test_the_names_of_numpy_1(tmp_path):
    value = {"metrics": {"acc": np.float64(92.7)}, "confusion": np.arange(3)}
    path = renamed(saved(tmp_path / "a.pth", value, zipped=False), b"numpy._core.", b"numpy.core.")
    found = read_state(path)
    assert found["metrics"] == {"acc": 92.7}
    assert found["confusion"].tolist() == [0, 1, 2]


class Call:
    """Pickled, it calls a function when it is read, and sets its state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self):
        return self.reduced


def array(shape, dtype, content):
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


def chained(times):
    value = Call(codecs.encode, "00" * 50, "latin1")
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return value


SCALAR = np._core.multiarray.scalar
TEXT = "x" * 100_000
HOSTILE = {
    "objects": np.array([1, "a"], object),
    "object scalar": Call(SCALAR, np.dtype("O"), 5),
    "fields": np.zeros(2, [("x", "f4"), ("y", "f4")]),
    "raw": np.zeros(2, "V10"),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "absurd text": Call(SCALAR, Call(np.dtype, "U1000000000"), b"a"),
    "absurd array": array((10**12,), np.dtype("f8"), b"12345678"),
    "negative": array((-1, -1), np.dtype("f8"), b"12345678"),
    "short scalar": Call(SCALAR, np.dtype("f8"), b"1234"),
    "swapped": np.arange(300, dtype=">f8"),
    "chain of codecs": chained(30),
    "another codec": Call(codecs.encode, "abc", "rot13"),
    "one long text, encoded often": [Call(codecs.encode, TEXT, "latin1") for _ in range(50_000)],
    "sized bytes": Call(bytes, 10**12),
    "a type's method": Call(np.dtype, "f8", False, True, state=(3, "<", Call(print, "x"), None, None, -1, -1, 0)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_plain_is_refused(tmp_path, capsys, name, zipped):
    path = saved(tmp_path / "a.pth", {"metrics": HOSTILE[name]}, zipped)
    with pytest.raises(CheckpointError, match=r"a\.pth: "), bounded():
        read_state(path)
    assert capsys.readouterr().out == ""


def test_an_array_without_content_takes_no_memory(tmp_path):
    with bounded():
        found = read_state(saved(tmp_path / "a.pth", {"a": Call(np.ndarray, (10**12,))}))
    assert found["a"].size == 0


STANDING_IN = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 88431234\n",
    "web page": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>Google Drive - virus scan warning</title>",
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("kind", STANDING_IN)
def test_what_stands_in_place_of_a_file(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(STANDING_IN[kind])
    with pytest.raises(CheckpointError, match=rf"w{suffix}: it is a {kind}.* download") as raised:
        read_weights(path)
    assert "\n" not in str(raised.value)
