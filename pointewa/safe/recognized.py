"""Files that are certainly no checkpoint, and what they are: so that a wrong name is not called a damaged file."""

import zipfile
from pathlib import Path

_PROGRAM = "which other runtimes run: name the run that it was exported from"
_BY_SUFFIX = {
    ".onnx": f"an ONNX program, {_PROGRAM}",
    **dict.fromkeys((".md", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".html", ".csv", ".log", ".py"), "a text file"),
    **dict.fromkeys((".ply", ".pcd", ".xyz", ".npy", ".npz", ".off", ".obj", ".stl", ".glb"), "a cloud or a mesh"),
    **dict.fromkeys((".h5", ".hdf5"), "a file of clouds"),
    **dict.fromkeys((".png", ".jpg", ".svg", ".pdf"), "a picture"),
}  # fmt: skip
# A member of the archive that only this kind has.
_BY_MEMBER = {
    "constants.pkl": f"a TorchScript program, {_PROGRAM}",
    "archive_format": f"a torch.export program, {_PROGRAM}",
}


def other_kind(path: Path) -> str:
    """What an existing file is instead of a checkpoint; empty if it may be one. Nothing in it is unpacked."""
    if not path.is_file():
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(name).name for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        members = set()
    found = next((kind for member, kind in _BY_MEMBER.items() if member in members), "")
    return found or _BY_SUFFIX.get(path.suffix.lower(), "")
