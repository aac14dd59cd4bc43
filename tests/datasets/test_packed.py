"""The packed file: what is written comes back, alone or streamed, and damage is noticed."""

import gc
import threading
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import packed
from pointewa.datasets.loader import EvalLoader, TrainLoader
from pointewa.datasets.prepare import originals, prepare
from pointewa.datasets.source import Cloud, Source
from pointewa.datasets.streamed import StreamedClouds
from pointewa.errors import DataError
from pointewa.models.parts import Parts


def pack(path, root, name="modelnet40", int16=False, **options):
    """As tools.prepare_data does."""
    sources = {split: datasets.open_source(name, str(root), split, **options) for split in ("train", "test")}
    count = sources["train"].num_points
    splits = {split: (one, count, prepare(one, count, "", int16)) for split, one in sources.items()}
    packed.write(path, splits, int16)
    return path


@pytest.fixture(params=["float32", "int16"])
def file(request, tmp_path, layouts):
    layouts.ply_hdf5(tmp_path / "source", layouts.procedural(128))
    return pack(tmp_path / "modelnet40_128.h5", tmp_path / "source", int16=request.param == "int16")


def test_a_packed_set_is_what_its_source_is_prepared_to(file, tmp_path):
    for split in ("train", "test"):
        direct = datasets.load("modelnet40", str(tmp_path / "source"), split)
        again = datasets.load("modelnet40", str(file), split)
        assert again.labels.tolist() == direct.labels.tolist()
        assert (again.class_names, again.object_names) == (direct.class_names, direct.object_names)
        with h5py.File(file) as h5:
            exact = h5[split]["data"].dtype == np.float32
        if exact:
            assert torch.equal(again.points, direct.points)
        else:  # on a grid of 1/32767, whose own order it is
            near = torch.cdist(again.points, direct.points, compute_mode="donot_use_mm_for_euclid_dist")
            assert near.amin(2).max() < 3e-5
            assert near.amin(1).max() < 3e-5


def test_a_packed_set_is_used_as_it_is(file, cache):
    before = set(cache.iterdir())
    source = datasets.open_source("modelnet40", str(file), "train")
    assert source.ordered
    head = datasets.load("modelnet40", str(file), "train", 32)
    assert head.points.shape == (12, 38, 3)
    assert torch.equal(head.points, datasets.load("modelnet40", str(file), "train").points[:, :38])
    assert set(cache.iterdir()) == before


def test_points_that_packing_repeated_are_not_read_as_points_of_the_object(tmp_path):
    """An object of 30 points in a pack of 100 is scored, and normalised anew, by its own 30."""
    rng = np.random.default_rng(0)
    clouds = [Cloud(rng.normal(3, 1, (size, 3)).astype(np.float32), rng.integers(0, 2, size)) for size in (30, 100)]
    made = Source("made", tmp_path, (), ("a",), ("small", "large"), np.array([0, 0]), None, lambda count: iter(clouds),
                  normalize=False, point_labels=True, parts=Parts(("x", "y"), (0, 0)))  # fmt: skip
    packed.write(tmp_path / "p.h5", {"train": (made, 100, prepare(made, 100, ""))})
    again = packed.source(tmp_path / "p.h5", "train", normalize=False)
    for (points, labels), cloud in zip(originals(again, 100), clouds, strict=True):
        assert sorted(points.tolist()) == sorted(cloud.points.tolist())
        assert labels.sum() == cloud.point_labels.sum()
    for loaded, direct in zip(prepare(again.normalized_as("unit_sphere"), 100, ""),
                              prepare(replace(made, normalize=True), 100, ""), strict=True):  # fmt: skip
        assert loaded.distinct == direct.distinct
        assert np.allclose(loaded.points, direct.points, atol=1e-5)


def test_masks_and_scale_are_kept(tmp_path, layouts):
    small = layouts.procedural(64)
    small["train"].points *= 7
    layouts.scanobjectnn(tmp_path / "s", small, "obj_bg")
    file = pack(tmp_path / "scanobjectnn_obj_bg_64.h5", tmp_path / "s", "scanobjectnn", variant="obj_bg")
    layouts.scanobjectnn(tmp_path / "few", layouts.procedural(16), "obj_bg")
    few = pack(tmp_path / "scanobjectnn_obj_bg_16.h5", tmp_path / "few", "scanobjectnn", variant="obj_bg")
    for count, path in ((16, few), (17, file)):
        assert datasets.open_source("scanobjectnn", str(tmp_path), "train", count, "obj_bg").path == path
    few.unlink()
    direct = datasets.load("scanobjectnn", str(tmp_path / "s"), "train", variant="obj_bg")
    again = datasets.load("scanobjectnn", str(tmp_path), "train", variant="obj_bg")
    assert again.source == str(file)
    assert torch.equal(again.points, direct.points)
    assert torch.equal(again.point_labels, direct.point_labels)
    assert 0 < again.point_labels.sum() < again.point_labels.numel()
    assert not again.normalized


def labelled(tmp_path, layouts):
    """A packed file in which a point's label tells whether its x is positive, and its loading: resident, streamed."""
    layouts.scanobjectnn(tmp_path / "s", layouts.procedural(64), "obj_bg")
    file = pack(tmp_path / "scanobjectnn_obj_bg_64.h5", tmp_path / "s", "scanobjectnn", variant="obj_bg")
    load = lambda: [datasets.load("scanobjectnn", str(file), "train", 48, variant="obj_bg", stream=stream)  # noqa: E731
                    for stream in (False, True)]  # fmt: skip
    return file, load


def test_point_labels_stay_with_their_points_in_memory_and_streamed(tmp_path, layouts):
    _, load = labelled(tmp_path, layouts)
    resident, streamed = (one.take([7, 2, 9, 4]) for one in load())
    assert resident.point_labels.dtype == torch.int64
    for (points, labels, point_labels), theirs in zip(
        EvalLoader(resident, 3, 40), EvalLoader(streamed, 3, 40), strict=True
    ):
        assert point_labels.shape == points.shape[:2] == (len(labels), 40)
        assert torch.equal(point_labels, (points[..., 0] > 0).long())
        assert all(map(torch.equal, (points, labels, point_labels), theirs))
    for augmentations in ([], ["dropout"]):
        batches = [list(TrainLoader(one, 2, 32, augmentations, 5).epoch(1)) for one in (resident, streamed)]
        for (points, _, point_labels), theirs in zip(*batches, strict=True):
            assert torch.equal(point_labels, (points[..., 0] > 0).long())
            assert torch.equal(points, theirs.points)
            assert torch.equal(point_labels, theirs.point_labels)


def test_a_mask_of_an_older_file_is_read_as_point_labels(tmp_path, layouts):
    file, load = labelled(tmp_path, layouts)
    new = load()[0]
    with h5py.File(file, "r+") as h5:
        for split in ("train", "test"):
            h5[split]["mask"] = h5[split]["point_labels"][:].astype(bool)
            del h5[split]["point_labels"]
    for old in load():
        (batch,) = EvalLoader(old, 12, 48)
        assert batch.point_labels.dtype == torch.int64
        assert torch.equal(batch.point_labels, new.point_labels[:, :48])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(np.zeros((12, 63), np.int32), r"point_labels \[12, 63\]"), (np.zeros((12, 64)), "expected whole numbers")],
)
def test_point_labels_that_do_not_fit_are_refused(tmp_path, layouts, wrong, message):
    file, load = labelled(tmp_path, layouts)
    with h5py.File(file, "r+") as h5:
        del h5["train/point_labels"]
        h5["train/point_labels"] = wrong
    with pytest.raises(DataError, match=message):
        load()


def test_resident_and_streamed_batches_are_the_same(file):
    resident, streamed = (
        datasets.load("modelnet40", str(file), "train", 64, stream=stream) for stream in (False, True)
    )
    assert isinstance(streamed, StreamedClouds)
    assert len(streamed) == len(resident) == 12
    for epoch, start in ((0, 0), (1, 2)):
        batches = [
            list(TrainLoader(one, 3, 64, ["scale_shift"], 5).epoch(epoch, start)) for one in (resident, streamed)
        ]
        assert len(batches[0]) == 4 - start
        for (points, labels, _), (others, theirs, _) in zip(*batches, strict=True):
            assert torch.equal(points, others)
            assert torch.equal(labels, theirs)
    for (points, labels, _), (others, theirs, _) in zip(
        *(EvalLoader(one, 5, 64) for one in (resident, streamed)), strict=True
    ):
        assert torch.equal(points, others)
        assert torch.equal(labels, theirs)


def test_streamed_clouds_are_split_and_taken_as_resident_ones(file):
    resident, streamed = (
        datasets.load("modelnet40", str(file), "train", 64, stream=stream) for stream in (False, True)
    )
    for mine, theirs in zip(resident.split(0.3, 1), streamed.split(0.3, 1), strict=True):
        assert mine.object_names == theirs.object_names
        assert mine.labels.tolist() == theirs.labels.tolist()
        index = torch.arange(len(mine)).flip(0)
        assert torch.equal(next(mine.batches([index], 10)).points, next(theirs.batches([index], 10)).points)


def test_a_set_that_would_fill_the_memory_is_streamed(file, monkeypatch, capsys):
    monkeypatch.setattr("pointewa.datasets.prepare.free_memory", lambda device: 2 * 12 * 12 * 75 - 1)
    load = lambda stream: datasets.load("modelnet40", str(file), "train", 64, stream=stream)  # noqa: E731
    assert isinstance(load(None), StreamedClouds)
    assert "streamed from disk" in capsys.readouterr().err
    monkeypatch.setattr("pointewa.datasets.prepare.free_memory", lambda device: 2 * 12 * 12 * 75)
    assert isinstance(load(None), datasets.PointClouds)


def test_reading_stops_with_the_epoch(file):
    """An epoch that is left early leaves no thread and no open file behind."""
    streamed = datasets.load("modelnet40", str(file), "train", 64, stream=True)
    before = threading.active_count()
    for _ in range(3):
        batches = TrainLoader(streamed, 2, 64, [], 0).epoch(0)
        next(batches)
        assert threading.active_count() == before + 1
        batches.close()
    gc.collect()
    assert threading.active_count() == before
    with h5py.File(file, "r+"):  # fails while it is open for reading
        pass


def test_damage_is_noticed_in_the_stream_too(tmp_path, layouts):
    layouts.ply_hdf5(tmp_path / "source", layouts.procedural(128))
    file = pack(tmp_path / "modelnet40_128.h5", tmp_path / "source")
    streamed = datasets.load("modelnet40", str(file), "train", 64, stream=True)
    content = bytearray(file.read_bytes())
    content[content.index(datasets.load("modelnet40", str(file), "train").points[7].numpy().tobytes()) + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"modelnet40_128\.h5"):
        list(TrainLoader(streamed, 12, 64, [], 0).epoch(0))


def test_the_digest_tells_contents_not_compression(file, tmp_path, layouts):
    with h5py.File(file) as h5:
        assert packed.digest(h5["train"]) == h5["train"].attrs["sha256"]
        other = tmp_path / "other.h5"
        with h5py.File(other, "w") as copy:
            copy.create_group("train")
            for name in ("data", "label", "name"):
                copy["train"][name] = h5["train"][name][:]
            assert packed.digest(copy["train"]) == packed.digest(h5["train"])
            copy["train/label"][0] += 1
            assert packed.digest(copy["train"]) != packed.digest(h5["train"])


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path, layouts):
    layouts.ply_hdf5(tmp_path / "source", layouts.procedural(128))
    source = datasets.open_source("modelnet40", str(tmp_path / "source"), "train")

    def broken(count):
        yield from list(source.clouds(count))[:5]
        raise DataError("the sixth is broken")

    bad = replace(source, clouds=broken)
    with pytest.raises(DataError, match="the sixth"):
        packed.write(tmp_path / "out" / "a.h5", {"train": (bad, 128, prepare(bad, 128, ""))})
    assert not list((tmp_path / "out").iterdir())
