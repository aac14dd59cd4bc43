"""Sets of images: layouts, order, what is converted or refused, and what is drawn from them."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pointewa import datasets
from pointewa.config import load_config
from pointewa.datasets.images import AUGMENTATIONS, Images, ImageTrainLoader, crop, flip
from pointewa.datasets.inspect.images import inspect
from pointewa.datasets.splits import training_data
from pointewa.errors import ConfigError, DataError
from pointewa.ops.images import fitted

RNG = np.random.default_rng(0)


def picture(size=(8, 8), mode="RGB", form="png"):
    """A random image as a file's bytes."""
    image = Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def tree(classes=("b", "a"), per_class=4, **options):
    """Names and contents of a small set, in no particular order."""
    return {
        f"{split}/{name}/{number}.png": picture(**options)
        for split in ("train", "test")
        for number in reversed(range(per_class))
        for name in classes
    }


def written(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zipped(path, files, above=""):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(above + name, data)
    return path


def load(root, split="train", **options):
    return datasets.load("images", str(root), split, **({"img_size": 8} | options))


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    more = {"train/B/x.png": picture(), "train/B/sub/0.PNG": picture(), "train/B/sub-a/1.png": picture(),
            "train/B/sub/a/1.png": picture(), "test/B/0.png": picture(), "train/a/10.png": picture(),
            "train/a/note.txt": b"no image", ".hidden/x.png": b"", "elsewhere/1.png": picture()}  # fmt: skip
    written(tmp_path, tree() | more)
    (tmp_path / "train/z").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "test/z").symlink_to(tmp_path / "elsewhere")
    found, expected = load(tmp_path), torchvision.datasets.ImageFolder(tmp_path / "train")
    assert found.class_names == tuple(expected.classes) == ("B", "a", "b", "z")
    assert found.labels.tolist() == expected.targets
    pixels = torch.stack([torchvision.transforms.functional.pil_to_tensor(image) for image, _ in expected])
    assert torch.equal(found.pixels, pixels)
    assert [Path(name).name for name in found.object_names] == [Path(path).name for path, _ in expected.samples]


@pytest.mark.parametrize("above", ["", "set/", "a/b/"])
def test_a_zip_file_is_the_folder_that_it_was_made_of(tmp_path, above):
    files = tree()
    written(tmp_path / "folder", files)
    zipped(tmp_path / "set.zip", files | {"__MACOSX/train/x/1.png": b"x"}, above)
    written(tmp_path, {"other.zip": b"no archive"})
    before = sorted(tmp_path.rglob("*"))
    for split in ("train", "test"):
        folder, inside, named = (load(tmp_path / place, split) for place in ("folder", "", "set.zip"))
        assert torch.equal(folder.pixels, inside.pixels)
        assert torch.equal(folder.pixels, named.pixels)
        assert torch.equal(folder.labels, inside.labels)
        assert folder.object_names == inside.object_names
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_nothing_is_needed_for_the_gratings():
    train, test = (load("gratings", split, img_size=32) for split in ("train", "test"))
    assert (len(train), len(test), len(train.class_names)) == (4000, 1000, 8)
    assert train.pixels.shape[1:] == (3, 32, 32)
    assert not torch.equal(train.pixels[:1000], test.pixels)
    assert train.labels.bincount().min() > 400


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected the folders train and test .*, found neither"),
        ({"train/a/1.png": b""}, "found neither"),
        ({"train/1.png": b"", "test/a/1.png": b""}, "expected train/<class>/<images>, found no classes"),
        (tree() | {"train/c/1.txt": b""}, "train/c: expected images"),
        (tree() | {"train/c/1.png": b""}, "same classes .*, found 1 in one only, such as train/c"),
        (tree() | {"test/c/1.png": b""}, "such as test/c"),
        (tree() | {"train/a/1.png": b"no image"}, "train/a/1.png: damaged, or no image of a known format"),
        (tree() | {"train/a/1.png": picture()[:100]}, "train/a/1.png: cannot be read as an image"),
        (tree() | {"train/a/1.png": picture(mode="I;16")}, "train/a/1.png: expected 8 bits a channel, found .*'I;16'"),
        (tree() | {"train/a/1.png": picture(form="gif")}, "train/a/1.png: damaged, or no image of a known format"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load(written(tmp_path / "folder", files))
    if "neither" not in message:
        with pytest.raises(DataError, match=message):
            load(zipped(tmp_path / "set.zip", files))


def test_zip_files_of_bad_will_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"refused, its member '\.\./evil.png' would leave"):
        load(zipped(tmp_path / "a.zip", tree() | {"../evil.png": picture()}))
    with pytest.raises(DataError, match="found train and two/train: keep one"):
        load(zipped(tmp_path / "b.zip", tree() | {f"two/{name}": data for name, data in tree().items()}))
    whole = zipped(tmp_path / "c.zip", tree()).read_bytes()
    broken = whole.replace(b"IDAT", b"IDAX", 1)
    (tmp_path / "c.zip").write_bytes(broken)
    with pytest.raises(DataError, match=r"c\.zip \(member 'train/b/3.png'\): Bad CRC"):
        load(tmp_path / "c.zip")
    (tmp_path / "x").mkdir()
    zipped(tmp_path / "x/1.zip", tree())
    zipped(tmp_path / "x/2.zip", tree())
    with pytest.raises(DataError, match=r"found 2 such zip files \(1.zip, 2.zip\)"):
        load(tmp_path / "x")


def test_other_kinds_and_sizes_are_converted_with_a_note(tmp_path, capsys):
    files = tree() | {"train/a/0.png": picture(mode="L"), "train/a/1.png": picture(mode="RGBA"),
                      "train/b/0.png": picture((16, 24)), "train/b/1.png": picture((4, 4))}  # fmt: skip
    found = load(written(tmp_path, files))
    notes = capsys.readouterr().err
    assert "1 of 8 images are L and converted to RGB\n" in notes
    assert "1 of 8 images are RGBA and converted to RGB\n" in notes
    assert "2 of 8 images are not 8 x 8: resized and cropped in the middle; data.img_size is 8" in notes
    grey = np.array(Image.open(tmp_path / "train/a/0.png"))
    assert torch.equal(found.pixels[0], torch.from_numpy(grey).expand(3, 8, 8))
    assert found.pixels.shape == (8, 3, 8, 8)
    load(tmp_path, "test")
    assert capsys.readouterr().err == ""


def test_frames_turned_images_and_other_files_are_noted(tmp_path, capsys):
    image, upright, turned, frames = Image.new("RGB", (8, 8)), Image.Exif(), Image.Exif(), io.BytesIO()
    upright[0x0112], turned[0x0112] = 1, 6
    image.save(frames, "tiff", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")] * 2)
    files = tree(per_class=2) | {"train/a/2.tif": frames.getvalue(), "train/a/3.gif": b"", "train/b/readme": b"",
                                 "train/b/.DS_Store": b"", "test/b/Thumbs.db": b""}  # fmt: skip
    for name, data in {"train/b/2.jpg": upright, "train/b/3.jpg": turned}.items():
        image.save(written_to := io.BytesIO(), "jpeg", exif=data)
        files[name] = written_to.getvalue()
    found = load(written(tmp_path, files))
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path}: 1 of 7 images are to be turned by their EXIF data and are left as they are, as torchvision "
        "leaves them",
        f"note: {tmp_path}: 1 of 7 images have several frames, of which the first is taken",
        f"note: {tmp_path}: left out 2 files of train not named as an image (1 .gif, 1 without a suffix)",
    ]
    assert (found.pixels[2] == 0).all()
    load(tmp_path, "test")
    assert "left out 1 file of test not named as an image (1 .db)" in capsys.readouterr().err


def test_damaged_exif_data_do_not_cost_the_image(tmp_path, capsys):
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.new("RGB", (8, 8), "blue").save(file, "webp", exif=turned)
    damaged = file.getvalue().replace(b"II*\0", b"XX*\0").replace(b"MM\0*", b"XX\0*")
    assert damaged != file.getvalue()
    found = load(written(tmp_path, tree() | {"train/a/0.webp": damaged}))
    assert found.pixels[1, 2].float().mean() > 200
    assert capsys.readouterr().err == ""


def test_a_larger_image_keeps_its_middle():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.randint(256, (3, 16, 33), dtype=torch.uint8)
    shrunk = functional.resize(image, [8, 16], antialias=True)  # the shorter side of 16 to 8, and 33 in proportion
    assert torch.equal(fitted(image, 8), shrunk[:, :, 4:12])


def test_crop_and_flip_are_torchvisions_for_each_image():
    functional = pytest.importorskip("torchvision.transforms.functional")
    images, generator = torch.rand(64, 3, 16, 16) * 2 - 1, torch.Generator()
    corner = torch.randint(5, (2, 64, 1), generator=generator.manual_seed(3)).squeeze(2)
    cropped = crop(images, generator.manual_seed(3))
    for image, top, left, found in zip(images, *corner.tolist(), cropped, strict=True):
        padded = functional.pad(image, [2] * 4, fill=-1.0)
        assert torch.equal(found, functional.crop(padded, top, left, 16, 16))
    assert (corner.min(), corner.max()) == (0, 4)
    flipped = flip(images, generator.manual_seed(4))
    mirrored = [torch.equal(one, functional.hflip(image)) for one, image in zip(flipped, images, strict=True)]
    same = [torch.equal(one, image) for one, image in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 15 < sum(mirrored) < 49


def test_batches_depend_on_seed_epoch_and_number_only():
    images = load("gratings", "test", img_size=32)
    first, again = (ImageTrainLoader(images, 32, 1, list(AUGMENTATIONS), seed=1) for _ in range(2))
    whole = list(first.epoch(2))
    resumed = list(again.epoch(2, start=20))
    assert torch.equal(whole[20].points, resumed[0].points)
    assert not torch.equal(whole[0].points, next(first.epoch(3)).points)
    halves = [next(ImageTrainLoader(images, 32, 1, [], 1, rank, 2).epoch(0)) for rank in (0, 1)]
    plain = next(ImageTrainLoader(images, 32, 1, [], seed=1).epoch(0))
    assert torch.equal(torch.cat([half.points for half in halves]), plain.points)
    assert plain.points.min() >= -1
    assert plain.points.max() <= 1
    names = ImageTrainLoader(images, 32, 1, [], seed=1).object_names(0, 0)
    place = images.object_names.index(names[0])
    assert torch.equal(plain.points[0], images.pixels[place].float() / 127.5 - 1)


def test_training_and_validation_images_are_others_and_the_same_for_every_seed():
    def drawn(seed):
        config = load_config(["configs/images.yaml"], [f"train.seed={seed}", "data.train_fraction=0.2",
                                                       "data.val_fraction=0.04", "train.device=cpu"])  # fmt: skip
        data = training_data(config)
        return set(data.train.clouds.object_names), set(data.val.clouds.object_names), data

    train, val, data = drawn(0)
    assert drawn(1)[:2] == (train, val)
    assert not train & val
    assert (len(train), len(val), len(data.test.clouds)) == pytest.approx((800, 160, 1000), abs=8)
    assert data.normalize == "minus_one_to_one"


def test_images_do_not_mix_with_clouds():
    for keys, message in (
        (["data.name=shapes"], r"data\.name: train\.task=image_classification expects images, found point clouds"),
        (["train.task=classification"], "train.task=classification expects point clouds, found images"),
        (["data.augment=[scale_shift]"], "data.augment: expected a list of crop, flip, found 'scale_shift'"),
    ):
        with pytest.raises(ConfigError, match=message):
            training_data(load_config(["configs/images.yaml"], [*keys, "train.device=cpu"]))
    with pytest.raises(DataError, match=r"data\.stream: images are held in memory"):
        load("gratings", stream=True)
    with pytest.raises(DataError, match=r"need \d+\.\d GiB, and .* are free: .* lower data.img_size"):
        load("gratings", img_size=10**5)


def test_labels_fit_the_classes():
    with pytest.raises(DataError, match="label 2, expected 0 to 1"):
        Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([2]), ("a", "b"), ("x",), "here")


def test_cifar_is_found_in_its_zip_file():
    folder = os.environ.get("POINTEWA_TEST_DATA", "")
    if not Path(folder, "cifar10_images.zip").is_file():
        pytest.skip("POINTEWA_TEST_DATA does not name a folder with cifar10_images.zip")
    sources = [datasets.open_source("images", folder, split) for split in ("train", "test")]
    assert [len(one) for one in sources] == [50_000, 10_000]
    assert sources[0].class_names == sources[1].class_names
    assert sources[0].class_names[::9] == ("airplane", "truck")
    assert np.bincount(sources[0].labels).tolist() == [5000] * 10
    assert next(sources[1].clouds(32)).points.shape == (32, 32, 3)


def test_what_inspection_counts(tmp_path):
    files = tree(per_class=3) | {"train/a/9.png": picture((5, 7))}
    files["train/b/0.png"] = files["train/b/2.png"] = files["test/a/1.png"] = files["train/a/1.png"]
    grey = picture(mode="L")
    files["test/b/1.png"], files["test/b/2.png"] = grey, grey  # the second of two
    written(tmp_path, files)
    found = inspect({split: datasets.open_source("images", str(tmp_path), split) for split in ("train", "test")})
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert (train["images"], test["images"]) == (7, 6)
    assert train["sizes"] == {"8 x 8": 6, "7 x 5": 1}
    assert train["classes"] == {"a": 4, "b": 3}
    assert found["same_pixels"] == {
        "train and train": {"images": 2, "of_two_classes": 2, "such_as": ["a/1.png", "b/0.png"]},
        "test and test": {"images": 1, "of_two_classes": 0, "such_as": ["b/1.png", "b/2.png"]},
        "train and test": {"images": 1, "of_two_classes": 0, "such_as": ["a/1.png", "a/1.png"]},
    }
