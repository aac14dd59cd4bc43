"""PCL's clouds."""

import re
from io import BytesIO

import numpy as np

from pointewa.datasets.files.columns import label, xyz
from pointewa.datasets.files.shape import MAX_POINTS, Shape

_MOST_VALUES = 10_000  # of a point


def read_pcd(data: bytes, labels: bool = False) -> Shape:
    """Points of a PCD file of any version, as text, binary or compressed; with their labels if they are asked for.

    pypcd4 reads what is after the header, which is written anew for it: it admits but one form of several in use.

    Raises:
        ValueError: a header that does not fit together; other numbers of points than announced.
    """
    import pypcd4

    found = re.search(rb"(?:^|(?<=[\r\n]))[ \t]*DATA[ \t]+(\w+)[ \t]*(?:\r\n|\n|\r)", data, re.IGNORECASE)
    if found is None:
        raise ValueError("expected a header that ends with a line DATA")
    lines = [line.split() for line in data[: found.start()].decode("ascii", "replace").splitlines()]
    header = {line[0].upper(): line[1:] for line in lines if line and not line[0].startswith("#")}
    fields, text = header.get("FIELDS") or header.get("COLUMNS") or [], found[1].lower() == b"ascii"
    sizes, types = header.get("SIZE", ["4"] * len(fields)), header.get("TYPE", ["F"] * len(fields))
    counts = list(map(int, header.get("COUNT", ["1"] * len(fields))))
    if not len(fields) == len(sizes) == len(types) == len(counts):
        raise ValueError(f"{len(fields)} fields, {len(sizes)} sizes, {len(types)} types, {len(counts)} counts")
    if "POINTS" in header:
        points = int(header["POINTS"][0])
    else:
        points = int(header["WIDTH"][0]) * int(header.get("HEIGHT", "1")[0])
    if not 0 <= points <= MAX_POINTS or not 0 <= sum(counts) <= _MOST_VALUES or min(counts, default=0) < 0:
        raise ValueError(f"expected at most {MAX_POINTS} points of {_MOST_VALUES} values, found more announced")
    names = [f"f{number}" for number in range(len(fields))]
    wanted = dict(zip("xyz", xyz(fields), strict=True)) | ({"label": label(fields)} if labels else {})
    for name, column in wanted.items():
        if counts[column] != 1:
            raise ValueError(f"{fields[column]}: expected one value of a point, found {counts[column]}")
        names[column] = name
    body = data[found.end() :]
    if text:  # pypcd4 takes single blanks only; float64 keeps all digits, whatever the size that is given
        body = b"\n".join(b" ".join(line.split()) for line in body.splitlines())
        sizes, types = ["8"] * len(fields), ["F"] * len(fields)
    kept = [one for one in zip(names, sizes, map(str.upper, types), map(str, counts), strict=True) if one[3] != "0"]
    rows = [" ".join((key, *values)) for key, values in zip(("FIELDS", "SIZE", "TYPE", "COUNT"), zip(*kept))]  # noqa: B905
    if found[1].lower() == b"binary_compressed":
        size = sum(int(one[1]) * int(one[3]) for one in kept) * points
        if points and int.from_bytes(body[4:8], "little") != size:
            raise ValueError(f"expected {size} bytes when unpacked, found {int.from_bytes(body[4:8], 'little')}")
    rows += ["VERSION 0.7", f"WIDTH {points}", "HEIGHT 1", "VIEWPOINT 0 0 0 1 0 0 0", f"POINTS {points}"]
    head = "\n".join([*rows, f"DATA {found[1].decode().lower()}\n"]).encode()
    cloud = pypcd4.PointCloud.from_fileobj(BytesIO(head + body))
    if cloud.pc_data.size != points:
        raise ValueError(f"{points} points announced, {cloud.pc_data.size} found")
    columns = [cloud.pc_data[name].ravel().astype(np.float64) for name in wanted]
    points = np.stack(columns[:3], 1)
    return Shape(points, labels=columns[3], labelled_by=fields[wanted["label"]]) if labels else Shape(points)
