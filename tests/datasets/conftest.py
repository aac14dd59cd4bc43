"""Small sets written in the layouts that people have on their disks, from real clouds where they are at hand."""

import json
import pickle
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from pointewa.datasets.layouts import scanobjectnn, shapes
from pointewa.ops import unit_sphere

CLASSES = ("airplane", "bathtub", "bed")  # of ModelNet40, in its order
PER_CLASS = {"train": 4, "test": 2}
FORMAT = ("v110", "v110")  # with checksums; files of the older format are first read by a process of its own


def procedural(num_points):
    """Clouds of three procedural classes under ModelNet40's names."""
    rng, kinds = np.random.default_rng(0), ("airplane", "cup", "table")
    result = {}
    for split, count in PER_CLASS.items():
        labels = np.repeat(np.arange(3), count)
        points = np.stack([shapes.sample(kinds[label], rng, num_points) for label in labels]).astype(np.float32)
        first = 1 if split == "train" else 1 + PER_CLASS["train"]
        names = [f"{CLASSES[label]}_{first + number % count:04}" for number, label in enumerate(labels)]
        result[split] = SimpleNamespace(points=points, labels=labels, names=names)
    return result


def real(file, num_points):
    """The first clouds of three classes of a packed file."""
    result = {}
    with h5py.File(file) as h5:
        for split, count in PER_CLASS.items():
            group = h5[split]
            rows = np.concatenate([np.flatnonzero(group["label"][:] == label)[:count] for label in range(3)])
            grid = group["data"]
            points = np.stack([grid[row, :num_points] for row in rows]).astype(np.float32)
            points = points * np.float32(grid.attrs["scale_factor"]) + np.float32(grid.attrs["add_offset"])
            names = [group["name"].asstr()[row] for row in rows]
            result[split] = SimpleNamespace(points=points, labels=group["label"][:][rows].astype(int), names=names)
    return result


@pytest.fixture(params=["procedural", "real"])
def small(request):
    """Of each split points ``[n, 256, 3]``, labels, names; by class, as the layouts list them."""
    if request.param == "procedural":
        return procedural(256)
    return real(request.getfixturevalue("real_data") / "modelnet40_1024.h5", 256)


def write_packed(folder, small, name="modelnet40_256.h5"):
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / name, "w", libver=FORMAT) as h5:
        h5.attrs["shape_names"] = list(CLASSES)
        for split, part in small.items():
            group = h5.create_group(split)
            grid = group.create_dataset("data", data=np.rint(part.points * 4000).astype(np.int16))
            grid.attrs["scale_factor"], grid.attrs["add_offset"] = 1 / 4000, 0.0
            group["label"], group["name"] = part.labels.astype(np.uint8), part.names
    return folder / name


def write_ply_hdf5(folder, small, id2file=True):
    """As published: several files a split, labels ``[n, 1]``, names in JSON files beside."""
    folder = folder / "modelnet40_ply_hdf5_2048"
    folder.mkdir(parents=True)
    (folder / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    for split, part in small.items():
        for number, rows in enumerate(np.array_split(np.arange(len(part.labels)), 2)):
            with h5py.File(folder / f"ply_data_{split}{number}.h5", "w", libver=FORMAT) as h5:
                h5["data"], h5["label"] = part.points[rows], part.labels[rows, None].astype(np.uint8)
            if id2file:
                listed = [f"{CLASSES[part.labels[row]]}/{part.names[row]}.ply" for row in rows]
                (folder / f"ply_data_{split}_{number}_id2file.json").write_text(json.dumps(listed))
    return folder


def write_lists(folder, small):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES))
    for split, part in small.items():
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(part.names))


def write_text(folder, small):
    folder = folder / "modelnet40_normal_resampled"
    write_lists(folder, small)
    for part in small.values():
        for points, label, name in zip(part.points, part.labels, part.names, strict=True):
            (folder / CLASSES[label]).mkdir(exist_ok=True)
            rows = np.concatenate([points, np.zeros_like(points)], 1)
            np.savetxt(folder / CLASSES[label] / f"{name}.txt", rows, "%.6f", delimiter=",")
    return folder


def write_dat(folder, small, lists=True):
    """Point-BERT's cache: a pickle of a list of ``[P, 6]`` and a list of labels ``[1]``."""
    folder = folder / "modelnet40_normal_resampled"
    folder.mkdir(parents=True)
    write_lists(folder, small)
    for split, part in small.items():
        points = [np.concatenate([cloud, np.zeros_like(cloud)], 1) for cloud in part.points]
        labels = [np.array([label], np.int32) for label in part.labels]
        with open(folder / f"modelnet40_{split}_8192pts_fps.dat", "wb") as file:
            pickle.dump([points, labels], file)
        if not lists:
            (folder / f"modelnet40_{split}.txt").unlink()
    return folder


def mesh(points, size=1e-4):
    """A mesh of tiny triangles of one size about the points: ``size`` off them at most."""
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]) * size
    return (points[:, None] + corners).reshape(-1, 3), np.arange(3 * len(points)).reshape(-1, 3)


def write_off(folder, small, glued=True):
    """As published: z up, and the counts often on the line of the header."""
    folder = folder / "ModelNet40"
    for split, part in small.items():
        for number, (points, label, name) in enumerate(zip(part.points, part.labels, part.names, strict=True)):
            x, y, z = points.T
            vertices, faces = mesh(np.stack([x, -z, y], 1))
            place = folder / CLASSES[label] / split
            place.mkdir(parents=True, exist_ok=True)
            lines = [f"OFF{'' if glued and number % 2 else chr(10)}{len(vertices)} {len(faces)} 0"]
            lines += ["{:.6f} {:.6f} {:.6f}".format(*vertex) for vertex in vertices]
            lines += ["3 {} {} {}".format(*face) for face in faces]
            (place / f"{name}.off").write_text("\n".join(lines) + "\n")
    return folder


MODELNET40 = {
    "packed": write_packed, "ply_hdf5": write_ply_hdf5, "text": write_text, "dat": write_dat, "off": write_off,
}  # fmt: skip


def write_scanobjectnn(folder, small, variant, mask=True, place=None):
    """A variant's files; in the mask -1 is the background."""
    place = folder / (place or ("main_split_nobg" if variant == "obj_only" else "main_split"))
    place.mkdir(parents=True, exist_ok=True)
    for split, part in small.items():
        name = f"{ {'train': 'training', 'test': 'test'}[split] }_{scanobjectnn.VARIANTS[variant]}.h5"
        with h5py.File(place / name, "w", libver=FORMAT) as h5:
            h5["data"], h5["label"] = part.points, part.labels.astype(np.int32)
            if mask:  # by a rule that a test can tell from the points
                h5["mask"] = np.where(part.points[..., 0] > 0, 4, -1).astype(np.int32)
    return place


def write_raw_scans(folder, small):
    """Raw objects of ScanObjectNN, some points on floor and wall, and the list of them."""
    place, lines = folder / "object_dataset", []
    for split, part in small.items():
        for number, (points, label) in enumerate(zip(part.points, part.labels, strict=True)):
            rows = np.zeros((len(points), 11), "<f4")
            rows[:, :3], rows[:, 3:9] = points, np.nan if number % 2 else 0.5  # normals and colours are not read
            # As test_scanobjectnn knows: the object, another one beside it, wall, floor, or nothing known.
            rows[:, 9], rows[:, 10] = 7, np.select([points[:, 0] > 0, points[:, 0] > -0.05], [5, 6], 1)
            rows[points[:, 1] < np.quantile(points[:, 1], 0.1), 10] = number % 3
            name = f"scene{number:04}_00_{len(lines):05}.bin"
            file = place / scanobjectnn.CLASSES[label] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(np.float32(len(points)).astype("<f4").tobytes() + rows.tobytes())
            lines.append(f"{name}\t{label}" + "\tt" * (split == "test"))
    (place / "split_new.txt").write_text("\n".join(lines) + "\n")
    return place


def farthest(a, b):
    """Largest distance of a point of ``a`` ``[N, P, 3]`` to the nearest of ``b`` ``[N, Q, 3]``."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").amin(2).max().item()


def same_clouds(loaded, points, atol):
    """The loaded clouds are the written ones as sets of points."""
    expected = torch.from_numpy(points)
    if loaded.normalized:
        expected = unit_sphere(expected)
    return max(farthest(loaded.points, expected), farthest(expected, loaded.points)) < atol


@pytest.fixture
def layouts():
    """The writers by name."""
    return SimpleNamespace(
        classes=CLASSES, modelnet40=MODELNET40, scanobjectnn=write_scanobjectnn, procedural=procedural, mesh=mesh,
        raw_scans=write_raw_scans, packed=write_packed, ply_hdf5=write_ply_hdf5,
        text=write_text, dat=write_dat, off=write_off,
    )  # fmt: skip
