"""The user's own clouds whose points are labelled by parts: from every kind of file, and what is refused."""

import gzip
import json
import re

import numpy as np
import pytest
import torch

from pointewa import datasets
from pointewa.datasets import found_parts, packed
from pointewa.datasets.files import read_cloud, read_labelled
from pointewa.datasets.prepare import prepare
from pointewa.errors import DataError

rng = np.random.default_rng(0)
POINTS = rng.normal(size=(60, 3)).round(4)
LABELS = rng.choice([0, 7, 12], 60)
OTHER = rng.normal(size=(60, 1)).round(3)  # a further column


def table(*columns, sep=" ", head="", form="%.4f"):
    rows = np.column_stack(columns)
    return (head + "\n".join(sep.join(form % value for value in row) for row in rows)).encode()


def ply(name="label", kind="int", form="ascii", faces=0):
    head = ["ply", f"format {form} 1.0", "element vertex 60", *(f"property float {one}" for one in "xyz"),
            "property uchar red", f"property {kind} {name}"]  # fmt: skip
    head += ["element face 1", "property list uchar int vertex_indices"] * faces + ["end_header\n"]
    dtype = [(one, "<f4") for one in "xyz"] + [
        ("red", "u1"),
        ("l", {"int": "<i4", "uchar": "u1", "float": "<f4"}[kind]),
    ]
    body = np.array([(*point, 9, label) for point, label in zip(POINTS, LABELS, strict=True)], dtype).tobytes()
    if form == "ascii":
        body = table(POINTS, 9 * np.ones(60), LABELS, form="%g") + b"\n" + b"3 0 1 2\n" * faces
    return "\n".join(head).encode() + body


def pcd(name="label", kind="U"):
    head = f"VERSION .7\nFIELDS x y z {name}\nSIZE 4 4 4 4\nTYPE F F F {kind}\nCOUNT 1 1 1 1\nWIDTH 60\nHEIGHT 1\n"
    return (head + "POINTS 60\nDATA ascii\n").encode() + table(POINTS, LABELS, form="%g")


def numpy_file(save, *args, **arrays):
    from io import BytesIO

    file = BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


RECORDS = np.zeros(60, [("x", "f8"), ("y", "f8"), ("z", "f8"), ("part_id", "u2"), ("i", "f4")])
for index, field in enumerate("xyz"):
    RECORDS[field] = POINTS[:, index]
RECORDS["part_id"] = LABELS

FORMS = {  # of each file its content and the column that holds the labels
    "last.txt": (table(POINTS, LABELS), ""),
    "last.xyz": (table(POINTS, OTHER, OTHER, OTHER, LABELS), ""),
    "last.csv": (table(POINTS, OTHER, LABELS, sep=","), ""),
    "colours.txt": (table(POINTS, 255 * np.ones((60, 3)), LABELS), ""),
    "named.csv": (table(POINTS, LABELS, OTHER, sep=",", head="x,y,z,Part,i\n"), "Part"),
    "cloudcompare.txt": (table(POINTS, OTHER, LABELS, head="//X Y Z Intensity Scalar_Classification\n"),
                         "Scalar_Classification"),
    "first.csv": (table(LABELS, POINTS, sep=";", head="class;x;y;z\n"), "class"),
    "ascii.ply": (ply(), "label"),
    "binary.ply": (ply("scalar_Label", "float", "binary_little_endian"), "scalar_label"),
    "uchar.ply": (ply("segment", "uchar", "binary_little_endian"), "segment"),
    "a.pcd": (pcd(), "label"),
    "float.pcd": (pcd("Classification", "F"), "Classification"),
    "plain.npy": (numpy_file(np.save, np.column_stack([POINTS, LABELS])), ""),
    "records.npy": (numpy_file(np.save, RECORDS), "part_id"),
    "a.npz": (numpy_file(np.savez, points=POINTS, labels=LABELS), "labels"),
    "with_class.npz": (numpy_file(np.savez, points=POINTS, label=3, seg=LABELS[:, None]), "seg"),
    "in_data.npz": (numpy_file(np.savez, data=np.column_stack([POINTS, LABELS])), ""),
    "packed.txt.gz": (gzip.compress(table(POINTS, LABELS)), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_labels_come_with_their_points(tmp_path, name):
    content, column = FORMS[name]
    (tmp_path / name).write_bytes(content)
    cloud, by = read_labelled(tmp_path / name)
    np.testing.assert_allclose(cloud.points, POINTS, atol=1e-6)
    assert cloud.point_labels.tolist() == LABELS.tolist()
    assert cloud.point_labels.dtype == np.int64
    assert by == column
    plain = read_cloud(tmp_path / name, 10)  # as classification reads it
    assert np.array_equal(plain.points, cloud.points)
    assert plain.point_labels is None


HOLED = np.where(np.arange(60)[:, None] % 4 == 1, np.nan, POINTS)
CUBE = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
REFUSED = {
    "none.txt": (
        table(POINTS),
        "expected whole numbers, the labels of the points, in the last column, found 3 columns",
    ),
    "normals.txt": (table(POINTS, POINTS), "in the last column, found other numbers"),
    "colours.txt": (table(POINTS, 255 * np.ones((60, 3))), "its last columns may be colours or labels"),
    "colours.npy": (numpy_file(np.save, np.column_stack([POINTS, np.ones((60, 3))])), "colours or labels"),
    "unnamed.csv": (
        table(POINTS, LABELS, sep=",", head="x,y,z,what\n"),
        "a column of labels, named label, part, class",
    ),
    "two.csv": (table(POINTS, LABELS, LABELS, sep=",", head="x,y,z,label,part\n"), "one column of labels.*label, part"),
    "negative.txt": (table(POINTS, LABELS - 1), "last column: expected whole numbers from 0 up, found -1 for point"),
    "half.csv": (table(POINTS, LABELS / 2, sep=",", head="x,y,z,label\n"), "label: expected whole numbers.*found 3.5"),
    "huge.txt": (table(POINTS, LABELS + 1e12), "found 1e+12 for point 0"),
    "nan.csv": (table(POINTS, LABELS * np.nan, sep=",", head="x,y,z,label\n"), "found nan for point 0"),
    "none.ply": (ply("quality"), "a column of labels.*found x, y, z, red, quality"),
    "mesh.ply": (ply(faces=1), "expected a cloud with labelled points, found a mesh: draw points on it"),
    "face_labels.ply": (
        ply("x1", faces=1).replace(b"property list", b"property int label\nproperty list"),
        "found a mesh",
    ),
    "mesh.npz": (numpy_file(np.savez, vertices=POINTS, faces=[[0, 1, 2]], label=[3]), "found a mesh"),
    "none.pcd": (pcd("intensity"), "a column of labels"),
    "mesh.obj": (CUBE, "expected a file with labelled points, ending in .ply.*found .obj"),
    "scan.las": (b"LASF", "expected a file with labelled points, ending in .ply.*found .las"),
    "scalar.npz": (numpy_file(np.savez, points=POINTS, label=3), "label: expected a label for each of 60 points"),
    "two.npz": (numpy_file(np.savez, points=POINTS, label=LABELS, part=LABELS), "one column of labels.*label, part"),
    "none.npz": (numpy_file(np.savez, points=POINTS, other=LABELS), "in the last column, found 3 columns"),
    "names.npz": (numpy_file(np.savez, points=POINTS, label=LABELS.astype(str)), "label: expected a label for each"),
    "columns.npy": (numpy_file(np.save, POINTS.T.copy()), "in the last column, found 3 columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clearly_labelled_is_refused_by_name(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("+", r"\+")) as caught:
        read_labelled(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_labels_of_points_that_are_not_finite_are_left_out_with_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(table(HOLED, LABELS))
    cloud, _ = read_labelled(tmp_path / "a.txt")
    kept = np.isfinite(HOLED).all(1)
    assert cloud.left_out == 15
    np.testing.assert_allclose(cloud.points, POINTS[kept])
    assert cloud.point_labels.tolist() == LABELS[kept].tolist()


def colour(point):
    """A label that a point's place tells."""
    return (point[..., 0] > 0) + 2 * (point[..., 1] > 0)


def write(root, values={"chair": [0, 7, 12, 13], "mug": [1, 2, 3, 4]}, layout="{name}/{split}"):  # noqa: B006
    """Clouds whose labels follow from the place of each point: of each class values[colour]."""
    made, draw = {}, np.random.default_rng(1)
    for name, mine in values.items():
        for split in ("train", "test"):
            folder = root / layout.format(name=name, split=split)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(3):
                points = draw.normal(size=(50, 3)).round(4)
                made[name, split, number] = points
                labels = np.array(mine)[colour(points)]
                (folder / f"{split}{number}.txt").write_bytes(table(points, labels))
    return made


@pytest.mark.parametrize("layout", ["{name}/{split}", "{split}/{name}"])
@pytest.mark.parametrize("stream", [False, True])
def test_parts_are_numbered_through_and_stay_with_their_points(tmp_path, layout, stream, capsys):
    write(tmp_path, layout=layout)
    found_parts_note = "parts by the labels in the last column: chair 0, 7, 12 to 13; mug 1 to 4; parts.json may name"
    for split in ("train", "test"):
        loaded = datasets.load("folder", str(tmp_path), split, 32, stream=stream, parts=True)
        assert loaded.parts.classes == (0, 0, 0, 0, 1, 1, 1, 1)
        assert loaded.parts.names[:3] == ("part 0", "part 7", "part 12")
        ((points, labels),) = loaded.batches([torch.arange(6)], 32)
        # The clouds were centred, so the place tells the part of most points only.
        agree = labels == colour(points.numpy()) + 4 * loaded.labels[:, None].numpy()
        assert agree.float().mean() > 0.85
    assert found_parts_note in capsys.readouterr().err


def test_classification_reads_the_same_points_without_labels(tmp_path):
    write(tmp_path)
    plain, labelled = (datasets.load("folder", str(tmp_path), "train", 32, parts=parts) for parts in (False, True))
    assert plain.parts is plain.point_labels is None
    assert torch.equal(plain.points, labelled.points)


def test_labels_that_occur_in_one_split_only_count_too(tmp_path):
    write(tmp_path)
    file = tmp_path / "mug" / "test" / "test1.txt"
    file.write_text(file.read_text().replace(" 4.0000", " 9.0000"))
    train, test = (datasets.open_source("folder", str(tmp_path), split, parts=True) for split in ("train", "test"))
    assert train.parts == test.parts
    assert train.parts.names[4:] == ("part 1", "part 2", "part 3", "part 4", "part 9")
    labels = set(np.concatenate([cloud.point_labels for cloud in test.clouds(1)]).tolist())
    assert labels == set(range(9))


def test_a_list_names_the_parts(tmp_path, capsys):
    write(tmp_path, {"chair": [0, 7, 12, 13], "mug": [0, 1, 1, 0]})
    names = {"mug": ["body", "handle", "lid"], "chair": {"13": "seat", "0": "leg", "7": "back", "12": "arm"}}
    (tmp_path / "parts.json").write_text(json.dumps(names))
    source = datasets.open_source("folder", str(tmp_path), "test", parts=True)
    assert source.parts.names == ("seat", "leg", "back", "arm", "body", "handle", "lid")
    assert source.parts.classes == (0, 0, 0, 0, 1, 1, 1)
    assert capsys.readouterr().err == ""
    plain = datasets.open_source("folder", str(tmp_path), "test")
    for label, cloud, same in zip(source.labels, source.clouds(1), plain.clouds(1), strict=True):
        expected = np.array([[1, 2, 3, 0], [4, 5, 5, 4]])[label][colour(same.points)]
        assert np.array_equal(cloud.point_labels, expected)
    names["chair"].pop("7")
    (tmp_path / "parts.json").write_text(json.dumps(names))
    with pytest.raises(
        DataError, match=r"test0.txt: last column: expected the labels of chair, 13, 0, 12, found 7: list"
    ):
        datasets.load("folder", str(tmp_path), "test", 32, parts=True)


BAD_LISTS = {
    "[]": "found list",
    "{": "JSONDecodeError",
    '{"chair": ["a"]}': "expected the parts of chair, mug, found those of chair",
    '{"chair": [], "mug": ["a"]}': "chair: expected 1 to 100 parts",
    '{"chair": ["a"], "mug": 3}': "mug: expected 1 to 100 parts",
    '{"chair": [1], "mug": ["a"]}': "chair: expected names of parts",
    '{"chair": {"-1": "a"}, "mug": ["a"]}': "chair: expected labels.*found -1",
    '{"chair": {"0": "a", "00": "b"}, "mug": ["a"]}': "chair: expected each label once, found 0, 00",
}


@pytest.mark.parametrize("text", BAD_LISTS)
def test_a_list_that_does_not_fit_is_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / "parts.json").write_text(text)
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / 'parts.json'))}.*{BAD_LISTS[text]}"):
        datasets.open_source("folder", str(tmp_path), "test", parts=True)


def test_a_column_of_other_numbers_is_refused(tmp_path):
    write(tmp_path)
    file = tmp_path / "mug" / "train" / "train1.txt"
    points = np.random.default_rng(0).normal(size=(300, 3))
    file.write_bytes(table(points, np.arange(300)))
    with pytest.raises(
        DataError, match=r"train1.txt: last column: expected at most 100 parts, found 300 labels from 0"
    ):
        datasets.open_source("folder", str(tmp_path), "test", parts=True)


def test_the_labels_found_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = tmp_path / "set"
    write(root)
    monkeypatch.setenv("POINTEWA_CACHE", str(tmp_path / "cache"))
    read, calls = found_parts.read_labelled, []
    monkeypatch.setattr(found_parts, "read_labelled", lambda file: calls.append(file) or read(file))
    first = datasets.open_source("folder", str(root / "."), "test", parts=True).parts
    assert len(calls) == 12
    assert datasets.open_source("folder", str(root), "test", parts=True).parts == first
    assert datasets.open_source("folder", str(root), "train", parts=True).parts == first
    assert len(calls) == 12
    (kept,) = (tmp_path / "cache").iterdir()
    for damaged in ("{}", '{"values": [["x"]], "columns": []}', "", "[]"):
        kept.write_text(damaged)
        assert datasets.open_source("folder", str(root), "test", parts=True).parts == first
    (root / "mug" / "train" / "more.txt").write_bytes(table(POINTS, LABELS))
    parts = datasets.open_source("folder", str(root), "test", parts=True).parts
    assert parts.names[4:] == tuple(f"part {value}" for value in (0, 1, 2, 3, 4, 7, 12))


def test_up_is_turned_and_a_packed_file_keeps_parts(tmp_path):
    write(tmp_path / "set")
    y, z = (datasets.open_source("folder", str(tmp_path / "set"), "test", variant=variant, parts=True)
            for variant in ("y_up", "z_up"))  # fmt: skip
    for one, other in zip(y.clouds(1), z.clouds(1), strict=True):
        assert np.array_equal(one.points[:, [0, 2]], other.points[:, [0, 1]])
        assert np.array_equal(one.point_labels, other.point_labels)
    file = tmp_path / "p.h5"
    packed.write(file, {"test": (y, 40, prepare(y, 40, ""))})
    loaded, expected = (datasets.load("folder", str(root), "test", 32, parts=True) for root in (file, tmp_path / "set"))
    assert loaded.parts == expected.parts
    assert torch.equal(loaded.point_labels[:, :32], expected.point_labels[:, :32])
    plain = datasets.open_source("folder", str(tmp_path / "set"), "test")
    packed.write(file.with_name("q.h5"), {"test": (plain, 40, prepare(plain, 40, ""))})
    with pytest.raises(DataError, match=r"folder does not tell the parts of objects \(.*q.h5\)"):
        datasets.open_source("folder", str(tmp_path / "q.h5"), "test", parts=True)
