"""The page of a run whose test split has hardly anything in it."""

import json
import warnings

import h5py
import numpy as np
import pytest
from pointewa.datasets.layouts.modelnet40 import OFFICIAL

from pointewa.datasets.subjects import Subjects
from pointewa.inference import page
from pointewa.tools import cli, evaluate, train, visualize

SMALL = [
    "data.name=modelnet40", "model.width=24", "model.depth=2", "model.heads=2", "model.num_groups=8",
    "model.group_size=8", "data.num_points=64", "train.epochs=1", "train.batch_size=40", "train.device=cpu",
]  # fmt: skip
TESTS = {"one": [0], "three": [5, 5, 5], "one class": [2] * 6, "few classes": [0, 0, 1, 9, 9, 39]}


def write(folder, test):
    """ModelNet40 of 40 training clouds, and test clouds of these classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with h5py.File(folder / "modelnet40_few.h5", "w") as h5:
        h5.attrs["shape_names"] = list(OFFICIAL)
        for split, labels in (("train", list(range(40))), ("test", test)):
            group = h5.create_group(split)
            group["data"] = rng.normal(size=(len(labels), 64, 3)).astype(np.float32)
            group["label"] = np.array(labels, np.uint8)
            group["name"] = [f"{split}{number}" for number in range(len(labels))]
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data with each of the test splits, and a classifier and an autoencoder trained with a single test object."""
    root = tmp_path_factory.mktemp("few")
    for name, labels in TESTS.items():
        write(root / name, labels)
    for name, more in (("classifier", []), ("autoencoder", ["train.task=masked_autoencoding", "ewa.enabled=false"])):
        keys = [*SMALL, *more, f"data.root={root / 'one'}", f"run.dir={root}", f"run.name={name}", "run.report=false"]
        train.main([*keys, "--json"])
    return root


@pytest.mark.parametrize(
    ("run", "test"), [*(("classifier", test) for test in TESTS), ("autoencoder", "one"), ("autoencoder", "one class")]
)
def test_a_page_of_few_objects(root, tmp_path, run, test):
    """What needs more objects is left out, with a note; all else is there."""
    subjects = Subjects(root / run, overrides=[f"data.root={root / test}", "train.device=cpu"])
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        numbers = page.write(root / run, subjects, tmp_path / "x.html", step=1)
    told = [str(note.message) for note in notes if "projector" in str(note.message)]
    assert numbers["objects"] == len(TESTS[test])
    features = list((root / run).glob("*/features/tensors.tsv"))
    for path in features:
        path.unlink()
    if len(TESTS[test]) < 4:
        assert told == [f"TensorBoard's projector is left out: expected at least 4 objects, got {len(TESTS[test])}"]
        assert not features
    else:
        assert not told
        assert len(features) == 1
    text = (tmp_path / "x.html").read_text()
    heading = "Confusion matrix" if run == "classifier" else "Reconstructions"
    assert f"<h2>{heading}</h2>" in text
    assert "nan" not in text.partition("<svg")[0].lower()


def test_a_training_with_a_single_test_object_ends_with_its_page(root, tmp_path, capsys):
    keys = [*SMALL, f"data.root={root / 'one'}", f"run.dir={tmp_path}", "run.name=a"]
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: [train.main(keys), exit(0)])
    captured = capsys.readouterr()
    assert ended.value.code == 0
    assert f"its page: {tmp_path}/a/report.html" in captured.out
    assert captured.err.endswith("projector is left out: expected at least 4 objects, got 1\n")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("test", ["one", "few classes"])
@pytest.mark.parametrize("what", ["cloud", "patches", "saliency", "errors", "embedding", "reconstruction"])
def test_drawings_of_few_objects(root, tmp_path, capsys, what, test):
    run = root / ("autoencoder" if what == "reconstruction" else "classifier")
    arguments = [what, "--run", str(run), "--out", str(tmp_path / "x.png"), "--html", str(tmp_path / "x.html"),
                 "--renderer", "matplotlib", f"data.root={root / test}", "train.device=cpu"]  # fmt: skip
    if what == "embedding" and len(TESTS[test]) < 4:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: visualize.main(arguments))
        assert ended.value.code == 2
        found = len(TESTS[test])
        assert f"\nerror: embedding: expected at least 4 objects, got {found}\n" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    else:
        visualize.main(arguments)
        assert len(list(tmp_path.iterdir())) == 2


def test_the_accuracies_of_classes_without_objects(root, capsys):
    """They are null, since JSON knows no NaN."""
    arguments = [str(root / "classifier"), f"data.root={root / 'few classes'}", "train.device=cpu", "--json"]
    evaluate.main(arguments)

    def refused(word):
        raise AssertionError(word)

    report = json.loads(capsys.readouterr().out, parse_constant=refused)
    known = [name for name, value in report["per_class"].items() if value is not None]
    assert known == [list(OFFICIAL)[label] for label in sorted({*TESTS["few classes"]})]
    assert 0 <= report["macc"] <= 100
