"""Laser scans."""

import functools
import select
import struct
import subprocess
import sys

import numpy as np

from pointewa.datasets.files.shape import MAX_BYTES, MAX_POINTS, Shape

# Damage can make the readers hang, end the process or ask for absurd memory, and no caller can catch that. So laspy
# runs in a process that may die, for one file after the other.
_WORKER = f"""
import resource, sys
from io import BytesIO
resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
import laspy, numpy
while size := int.from_bytes(sys.stdin.buffer.read(8), "little"):
    data = sys.stdin.buffer.read(size)
    try:
        with laspy.open(BytesIO(data), read_evlrs=False) as file:
            count, bytes_ = file.header.point_count, file.header.point_format.size
            if count > {MAX_POINTS} or count * bytes_ > {MAX_BYTES}:
                raise ValueError(f"expected at most {MAX_POINTS} points, found {{count}} announced")
            points = numpy.asarray(file.read().xyz, "<f8")
        if len(points) != count:
            raise ValueError(f"{{count}} points announced, {{len(points)}} found")
        answer = b"+" + points.tobytes()
    except BaseException as error:
        answer = f"-{{type(error).__name__}}: {{error}}".encode()
    sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
    sys.stdout.buffer.flush()
"""
_PATIENCE = 20.0  # seconds, and one more for each megabyte


def read_las(data: bytes) -> Shape:
    """Points of a LAS or LAZ file, scaled and with their offset.

    Raises:
        ValueError: damaged; other numbers of points than announced, or more than are read.
        ModuleNotFoundError: laspy is not installed.
    """
    import laspy  # noqa: F401  here, where the user is told if it is missing

    if data[:4] != b"LASF" or len(data) < 104:
        raise ValueError("expected a header that begins with LASF")
    header, start, records = struct.unpack_from("<HII", data, 94)
    if not header + 54 * records <= start <= len(data):  # laspy would look for all of them
        raise ValueError(f"{records} records before the points at byte {start} announced, in {len(data)} bytes")
    process, answer = _process(), b""
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
        if select.select([process.stdout], [], [], _PATIENCE + len(data) / 1e6)[0]:
            answer = process.stdout.read(int.from_bytes(process.stdout.read(8), "little"))
    except BrokenPipeError:
        pass
    if not answer:
        hung = process.poll() is None
        process.kill()
        process.wait()
        _process.cache_clear()
        raise ValueError("reading it does not end" if hung else "reading it crashes the reader")
    if answer[:1] == b"-":
        raise ValueError(answer[1:].decode(errors="replace"))
    return Shape(np.frombuffer(answer, "<f8", offset=1).reshape(-1, 3).astype(np.float64))  # a copy: writable, aligned


@functools.cache
def _process() -> subprocess.Popen:
    command = [sys.executable, "-c", _WORKER]  # it ends with this process, when its input does
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
