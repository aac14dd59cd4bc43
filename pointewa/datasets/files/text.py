"""Clouds as text: a row for each point."""

import re

import numpy as np

from pointewa.datasets.files.columns import label, last, xyz
from pointewa.datasets.files.shape import Shape, decode

_NUMBER = re.compile(r"""\s*["']?[-+.]*(?:\d|nan\b|inf)""", re.IGNORECASE)
_MICROSOFT_NAN = re.compile(r"[-+]?1\.#(?:QNAN|SNAN|IND|INF)\d*", re.IGNORECASE)
_COMMENT = re.compile(r"\s*(?:#|//|%)")


def read_text(data: bytes, labels: bool = False) -> Shape:
    """Rows of numbers, separated by blanks, commas, semicolons or tabs; x, y, z come first unless a header names them.

    Before them there may be comments (#, //, %), a line with the names of the columns, and one with the number of rows.

    Args:
        data: the file.
        labels: read the labels of the points too, from the column that a header names, else from the last one.

    Raises:
        NoLabelsError: no labels, where they are asked for.
        ValueError: names without x, y and z; a first column that counts the rows; other numbers of rows than announced;
            decimal commas; anything that is no number.
    """
    text = _MICROSOFT_NAN.sub("nan", decode(data))
    lines = [line for line in text.splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if _NUMBER.match(line)), len(lines))
    head, rows = lines[:start], [line for line in lines[start:] if not _COMMENT.match(line)]
    if any("#" in line for line in rows):
        rows = [line.partition("#")[0] for line in rows]
    titles = [line for line in head if not _COMMENT.match(line)]
    if len(titles) > 1 or (titles and not rows and not re.search(r"[,;\t]", titles[0])):
        raise ValueError(f"expected rows of numbers, found {titles[-1][:60]!r}")
    if len(rows) > 1 and rows[0].strip().isdecimal() and not rows[1].strip().isdecimal():
        count = int(rows.pop(0))
        if count != len(rows):
            raise ValueError(f"{count} points announced, {len(rows)} found")
    if not rows:
        return Shape(np.empty((0, 3)))
    separator = next((one for one in ";\t," if one in rows[0]), None)
    first = _fields(rows[0], separator)
    _check_commas(rows[0], first, separator)
    if len(rows) > 1 and first == [str(i) for i in range(len(first))] and "." in rows[1]:
        raise ValueError("its first line numbers the columns: name them x, y and z there, or remove it")
    names = _names(head, titles, separator, len(first), _counts(rows, separator))
    columns = list(xyz(names) if names else (0, 1, 2))
    if labels:
        columns += [label(names)] if names else range(3, len(first))
    values = np.loadtxt(rows, delimiter=separator, usecols=columns, ndmin=2, comments=None, quotechar='"')
    if not labels:
        return Shape(values)
    if names:
        return Shape(values[:, :3], labels=values[:, 3], labelled_by=names[columns[3]])
    return Shape(values[:, :3], labels=last(values))


def _fields(row: str, separator: str | None) -> list[str]:
    fields = [field.strip().strip("\"'") for field in row.strip(" ").split(separator)]
    return fields[:-1] if len(fields) > 1 and not fields[-1] else fields  # a separator may end the row too


def _check_commas(row: str, fields: list[str], separator: str | None) -> None:
    # "0,25,0,5,1,75" would pass for six columns.
    pairs = separator == "," and len(fields) % 2 == 0 and len(fields) >= 6 and not re.search(r"[.eE]", row)
    if ("," in row and separator != ",") or (pairs and any(re.match(r"0\d", field) for field in fields[1::2])):
        raise ValueError(f"expected decimal points, found decimal commas as in {row[:60]!r}")


def _counts(rows: list[str], separator: str | None) -> bool:
    """Whether the first column counts the rows, from 0 or 1."""
    if len(rows) < 4:
        return False
    shown = [_fields(rows[i], separator)[0] for i in (0, 1, 2, len(rows) - 1)]
    return any(shown == [str(start + i) for i in (0, 1, 2, len(rows) - 1)] for start in (0, 1))


def _names(head: list[str], titles: list[str], separator: str | None, width: int, counted: bool) -> list[str]:
    """The names of the columns, where there are any, with x, y and z among them."""
    if titles:
        names = _fields(titles[0], separator)
        if len(names) == width - 1 and counted:  # as R writes them: no name for the names of the rows
            names.insert(0, "")
        if len(names) != width:
            raise ValueError(f"its header names {len(names)} columns, {', '.join(names)[:60]}, its rows have {width}")
        return names
    for line in reversed(head):  # a comment may name the columns, or say something else
        names = _fields(_COMMENT.sub("", line, count=1), separator)
        names = names if len(names) > 2 else re.split(r"[\s,;]+", _COMMENT.sub("", line, count=1).strip())
        try:
            xyz(names[-width:])
        except ValueError:
            continue
        return names[-width:]
    if counted and width > 3:
        raise ValueError("its first column counts the rows: name the columns in a first line, i x y z, or drop it")
    return []
