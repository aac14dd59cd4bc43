"""Files of `torch.save`, read without letting them run code, take any amount of memory, or be damaged unnoticed."""

import io
import os
import pickletools
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from pointewa.errors import CheckpointError, first_line
from pointewa.safe.files import stands_for
from pointewa.safe.numpy_values import STAND_INS
from pointewa.safe.recognized import other_kind

# What torch.save writes for dense tensors, plain containers, and NumPy's scalars and arrays. torch's own list is
# longer, and with what else is on it a file of a few bytes can take any amount of memory: bytearray(10**12), a
# conversion of a tensor of stride 0.
_STORED = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_ADMITTED = {
    "collections OrderedDict", "collections Counter", "__builtin__ set", "torch Size", "torch device",
    *(f"torch {name}Storage" for name in _STORED),
    *(f"torch {name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")),
    *(" ".join(name.rsplit(".", 1)) for name in STAND_INS), "__builtin__ bytes", "_codecs encode",
}  # fmt: skip

_EXPECTED = "a run folder, its last.ckpt, a .safetensors file, or a .pth of Point-MAE or Point-BERT"
PROGRAMMERS = (AttributeError, NameError, TypeError)  # a fault of the code that raises them, not of a file


def check_sums(path: Path) -> None:
    """Compare each part of a file of `torch.save` with the CRC-32 that is kept with it; torch itself does not."""
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            # torch writes no compressed parts, and none that share bytes: they could be far larger than the file.
            if any(part.compress_type for part in parts):
                raise ValueError("it has compressed parts")
            if sum(part.file_size for part in parts) > os.stat(path).st_size:
                raise ValueError("its parts are larger than the file")
            damaged = file.testzip()
            for part in parts:
                if part.filename.lower().endswith(".pkl"):  # torch ignores case
                    _check_pickle(io.BytesIO(file.read(part)))
    except (UnpicklingError, *PROGRAMMERS):
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise CheckpointError(
            f"{path}: cannot read the checkpoint, it is damaged ({first_line(error)[:200]})"
        ) from error
    if damaged:
        raise CheckpointError(f"{path}: the checkpoint is damaged: {damaged!r} does not fit its checksum")


def _check_pickle(file: BinaryIO) -> None:
    """Look through a pickle, without executing it, for anything that tensors and plain values do not need."""
    memo: dict[int, Any] = {}
    pushed, call = None, None  # what lies on top of the stack, if it matters; how far a call of encode has come
    for operation, argument, _ in pickletools.genops(file):
        name, repeated = operation.name, operation.name.endswith("GET")
        if name in ("GLOBAL", "STACK_GLOBAL", "INST") and argument not in _ADMITTED:
            raise UnpicklingError(f"it asks for {argument!r}")
        if name.endswith("PUT"):
            memo[argument] = pushed
            continue
        pushed = memo.get(argument) if repeated else (name, argument)
        # Bytes are held as encode(text, "latin1"). With other codecs, or of its own results, a short file could ask it
        # for any amount of memory; and so it could with a long text that is in the file once and encoded many times.
        if call is not None:
            text = pushed[1] if pushed and pushed[0] == "BINUNICODE" else None
            fits = (
                text is not None and not (repeated and len(text) > 1),
                text == "latin1",
                name == "TUPLE2",
                name == "REDUCE",
            )
            if not fits[call]:
                raise UnpicklingError("it asks for '_codecs encode' of something else than bytes")
            call = call + 1 if call < 3 else None
        elif pushed == ("GLOBAL", "_codecs encode"):
            call = 0


def read_state(path: Path) -> dict[str, Any]:
    """Content of a file written by `torch.save`: tensors and plain values only.

    NumPy's scalars, as in the metrics of Point-BERT's checkpoints, become numbers of Python; its arrays of plain types
    stay arrays.

    Raises:
        CheckpointError: missing, damaged, or holding anything else.
    """
    if other := other_kind(path):
        raise CheckpointError(f"{path}: expected {_EXPECTED}, found {other}")
    try:
        if path.exists() and not path.is_file():  # a folder; a pipe, which would be waited for
            raise CheckpointError(f"{path}: expected a file, found a folder or a device")
        with open(path, "rb") as file:
            if other := stands_for(file.read(1024)):
                raise CheckpointError(f"{path}: {other}")
            file.seek(0)
            if file.read(4) == b"PK\3\4":  # how torch tells
                check_sums(path)
            else:  # the format before torch 1.6: five pickles, then the numbers
                file.seek(0)
                for _ in range(5):
                    _check_pickle(file)
        try:
            with torch.serialization.safe_globals([(value, name) for name, value in STAND_INS.items()]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        except PROGRAMMERS as error:  # torch's reader raises them of damaged files
            raise ValueError(first_line(error)) from error
    except (CheckpointError, *PROGRAMMERS):
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of tensors and plain values, or damaged ({first_line(error)}): refused"
        ) from error
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise CheckpointError(
            f"{path}: cannot read the checkpoint, it is damaged ({first_line(error)[:200]})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary, found a {type(state).__name__}")
    return state
