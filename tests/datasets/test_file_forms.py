"""Files as other programs write them: read right, or refused with one line that says why."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
from file_forms import CLOUD, CLOUDS, CUBES, FLAT, NAN, REFUSED, binary, npy, pcd, ply_cloud, ply_faces, rows
from file_samples import write

from pointewa.datasets.files import kind, read_cloud, read_points
from pointewa.errors import DataError


def on_the_cube(points):
    """How many points are on each side of the unit cube; none may be elsewhere."""
    sides = [np.abs(points[:, axis] - end) < 1e-6 for axis in range(3) for end in (0, 1)]
    assert np.any(sides, axis=0).all()
    assert (points.min(), points.max()) == pytest.approx((0, 1), abs=1e-2)
    return np.sum(sides, axis=1)


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds(tmp_path, name, capsys):
    points = read_points(write(tmp_path, name, CLOUDS[name]), 7)
    np.testing.assert_allclose(points, CLOUD, rtol=0, atol=1e-7)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", CUBES)
def test_meshes(tmp_path, name):
    counts = on_the_cube(read_points(write(tmp_path, name, CUBES[name]), 1200))
    assert np.abs(counts - 200).max() < 5 * (1200 * 5 / 36) ** 0.5


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name, capsys):
    content, message = REFUSED[name]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        read_points(path, 10)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")


def test_names_of_columns_take_what_they_say_only(tmp_path):
    """Two triples, of which neither is plainly x, y and z."""
    names = "pos_x,pos_y,pos_z,utm_x,utm_y,utm_z\n"
    path = write(tmp_path, "a.csv", names + rows(np.c_[CLOUD, CLOUD], ","))
    with pytest.raises(DataError, match="expected columns named x, y and z, once each"):
        read_points(path, 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pcd", pcd(body=binary(NAN), kind="binary", WIDTH="10", HEIGHT="6")),
        ("text.pcd", pcd(body=rows(NAN).encode())),
        ("a.ply", ply_cloud(binary(NAN), "binary_little_endian")),
        ("text.ply", ply_cloud(rows(NAN))),
        ("a.npy", npy(NAN)),
        ("a.txt", rows(NAN)),
        ("microsoft.txt", rows(NAN).replace("nan", "-1.#IND")),
    ],
)
def test_rows_without_a_measurement_are_left_out(tmp_path, name, content, capsys):
    path, finite = write(tmp_path, name, content), np.isfinite(NAN).all(1)
    np.testing.assert_allclose(read_points(path, 1), CLOUD[finite], atol=1e-6)
    assert capsys.readouterr().err == f"note: {path}: 9 of 60 points are not finite: they are left out\n"
    assert read_cloud(path, 1).left_out == 9


def test_fewer_than_a_tenth_finite(tmp_path):
    for left, refused in ((6, False), (5, True)):
        path = write(tmp_path, "a.npy", npy(np.where(np.arange(60)[:, None] < left, CLOUD, np.inf)))
        if refused:
            with pytest.raises(
                DataError, match="55 of 60 points have coordinates that are not finite, expected at most"
            ):
                read_points(path, 1)
        else:
            assert len(read_points(path, 1)) == left


# Concave polygons


@pytest.mark.parametrize("turn", [np.eye(3), np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]), np.linalg.qr(CLOUD[:3])[0]])
@pytest.mark.parametrize("name", ["a.ply", "a.off", "a.obj"])
def test_concave_polygons_are_covered_and_nothing_else(tmp_path, name, turn):
    corners = np.c_[FLAT, np.zeros(5)] @ turn.T + 100
    lines = [" ".join(f"{value:.12g}" for value in row) for row in corners]
    content = {
        "a.ply": ply_faces([[0, 1, 2, 3, 4]], vertices=corners),
        "a.off": "OFF\n5 1 0\n" + "\n".join(lines) + "\n5 0 1 2 3 4\n",
        "a.obj": "".join(f"v {line}\n" for line in lines) + "f 1 2 3 4 5\n",
    }[name]
    x, y, z = ((read_points(write(tmp_path, name, content), 4000) - 100) @ turn).T
    tolerance = 1e-4 if name == "a.ply" else 1e-9  # float32 at 100
    roof = np.where(x < 2, 3 - x, x - 1)  # above the notch
    assert (y - roof).max() < tolerance
    assert np.abs(z).max() < tolerance
    assert (min(x.min(), y.min()), x.max()) == (pytest.approx(0, abs=0.1), pytest.approx(4, abs=0.1))
    left = (x < 1).sum()  # area 2.5 of 8
    assert abs(left - 4000 * 2.5 / 8) < 5 * (4000 * 0.3125 * 0.6875) ** 0.5


def test_concave_quads_among_convex_ones(tmp_path):
    arrow = [[0, 0, 0], [2, 1, 0], [0, 2, 0], [1, 1, 0]]
    square = [[3, 0, 0], [4, 0, 0], [4, 1, 0], [3, 1, 0]]
    content = "".join("v {} {} {}\n".format(*row) for row in arrow + square) + "f 4 1 2 3\nf 1 2 3 4\nf 5 6 7 8\n"
    x, y, _ = read_points(write(tmp_path, "a.obj", content), 3000).T
    low = np.minimum(y, 2 - y)
    assert ((x >= 3) | ((low - 1e-9 <= x) & (x <= 2 * low + 1e-9))).all()
    assert abs((x >= 3).sum() - 1000) < 5 * (3000 * 2 / 9) ** 0.5  # areas 1, 1 and 1


# The same as other readers read


def areas(vertices, faces):
    corners = vertices[np.asarray(faces)]
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2


@pytest.mark.parametrize("name", ["a.ply", "text.ply", "a.off", "a.obj", "a.stl", "text.stl"])
def test_meshes_as_meshio_writes_and_reads_them(tmp_path, name):
    import meshio
    import trimesh

    from pointewa.datasets.files import _READERS

    ball, path = trimesh.creation.icosphere(2), tmp_path / name
    options = {"binary": not name.startswith("text")} if path.suffix in (".ply", ".stl") else {}
    meshio.write(path, meshio.Mesh(ball.vertices, {"triangle": ball.faces}), **options)
    shape, other = _READERS[path.suffix](path.read_bytes()), meshio.read(path)
    faces = np.concatenate([block.data for block in other.cells if block.type == "triangle"])
    np.testing.assert_allclose(shape.vertices[shape.faces], other.points[faces], atol=1e-6)
    assert areas(shape.vertices, shape.faces).sum() == pytest.approx(ball.area, rel=1e-5)


def test_ply_as_plyfile_reads_it(tmp_path):
    import plyfile

    for name, content in [*CLOUDS.items(), *CUBES.items()]:
        path = write(tmp_path, name, content)
        try:
            vertices = plyfile.PlyData.read(path)["vertex"] if kind(path) == ".ply" and "gz" not in name else None
            expected = None if vertices is None else np.stack([vertices[one] for one in "xyz"], 1)
        except (plyfile.PlyParseError, ValueError):  # it does not take all that is in use
            continue
        if expected is not None and len(expected) == len(CLOUD):
            np.testing.assert_allclose(read_points(path, 1), expected, rtol=0, atol=1e-7)


def test_laser_scans_as_laspy_reads_them(tmp_path):
    import laspy

    for name in ("cloud.las", "cloud.laz"):
        path = write(tmp_path, name, CLOUDS[name])
        np.testing.assert_array_equal(read_points(path, 1), laspy.read(path).xyz)


def test_real_clouds(tmp_path, real_data):
    """ShapeNetPart's rows of x, y, z, a normal and a label."""
    files = sorted(real_data.glob("shapenetpart_sample/v0_normal/*/*.txt"))
    assert files
    for file in files:
        np.testing.assert_array_equal(read_points(file, 1), np.genfromtxt(file)[:, :3])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.ply", ".ply"),
        ("b.PLY", ".ply"),
        ("c.d.txt.gz", ".txt"),
        ("e.gz", ""),
        ("f.tar.gz", ""),
        (".ply", ""),
        ("g", ""),
    ],
)
def test_kinds(name, expected):
    assert kind(Path(name)) == expected


def cases():
    folder = Path(os.environ.get("POINTEWA_TEST_CASES", "nowhere"))
    if not (folder / "INDEX.tsv").is_file():
        return []
    with open(folder / "INDEX.tsv", encoding="utf-8") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(folder / "files" / one["file"], one["right behaviour"]) for one in found]


@pytest.mark.skipif(not cases(), reason="POINTEWA_TEST_CASES names no folder with INDEX.tsv and files")
@pytest.mark.parametrize(("path", "right"), cases(), ids=lambda value: getattr(value, "name", ""))
def test_collected_cases(path, right):
    """Files collected elsewhere, and what INDEX.tsv says of each."""
    try:
        points = read_points(path, 2000)
    except DataError as error:
        assert len(str(error).splitlines()) == 1
        assert re.search("refus|message|info", right)
        assert all(word in str(error) for word in re.findall(r"glTF 1\.0|Git LFS pointer", right))
        return
    assert not right.startswith(("refused", "the message"))
    if "cube" in right:
        counts = on_the_cube(points / (2 if "side 2" in right else 1))
        assert np.abs(counts - 2000 / 6).max() < 100
    elif right.startswith(("the 60", "the finite", "the cloud")) and len(points) != 8:
        reference = np.loadtxt(path.with_name("xyz_shapenet_part.txt"), usecols=(0, 1, 2))
        scale = np.abs(points).max() / np.abs(reference).max() if "int" in path.stem else 1  # whole numbers
        nearest = np.linalg.norm(points[:, None] / scale - reference, axis=2).min(1)
        assert len(points) in (51, 54, 59, 60)
        assert nearest.max() < (0.03 if scale > 1 else 1e-6)
