"""Cameras, colours, patches, mistakes, embeddings, experts: the numbers, and that something is drawn."""

import io

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread
from pointewa.datasets.layouts.modelnet40 import OFFICIAL
from pointewa.datasets.layouts.shapenet55 import CLASSES

import pointewa.ewa as ewa
from pointewa.ewa.experts import moe_layers
from pointewa.models import DiscreteVAE, MaskedAutoencoder, Reconstruction, TokenizerSizes
from pointewa.models.patch_embed import make_patches
from pointewa.models.presets import Architecture
from pointewa.runs.log import read_metrics
from pointewa.viz.clouds import clouds_figure, project, save_figure, upright
from pointewa.viz.embedding import embed, embedding_figure, embedding_picture
from pointewa.viz.experts import disagreements, experts_figure, pairwise_distances
from pointewa.viz.mistakes import confident_mistakes, mistake_title
from pointewa.viz.panels import MOST_POINTS, Panel, Picture, palette, plain_panel, stacked, view_matrix
from pointewa.viz.patches import cut, patch_panels
from pointewa.viz.reconstruction import reconstruction_picture
from pointewa.viz.window import placed


def drawn(path):
    """Share of the pixels that are not the background."""
    return float((imread(path)[..., :3].min(-1) < 0.97).mean())


def of_figure(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return drawn(file)


def cloud(points=300):
    return torch.rand(points, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_camera_looks_slightly_from_above():
    places, nearness, depth = project(np.array([[0, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], np.float32))
    assert places[0] == pytest.approx([0, 0])
    assert places[1][0] == pytest.approx(0, abs=1e-6)
    assert places[1][1] > 0.8  # up is up
    assert nearness[2] > nearness[3]
    assert depth[2] < depth[3]
    assert places[2][1] < 0 < places[3][1]  # from above: what is nearer is lower
    assert np.allclose(view_matrix() @ view_matrix().T, np.eye(3))
    assert np.linalg.det(view_matrix()) > 0.99
    sphere = np.random.default_rng(0).normal(size=(20_000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    reach = np.linalg.norm(project(sphere)[0], axis=1).max()
    assert 0.98 < reach <= 1 + 1e-6  # whichever way a cloud is turned it fits


def test_the_height_that_a_cloud_needs_is_that_of_all_its_turns():
    points = plain_panel(cloud() * torch.tensor([1.0, 0.2, 0.5]), "").fitted().points
    low, high = upright(points)
    turns = []
    for angle in np.linspace(0, 2 * np.pi, 721):
        sine, cosine = np.sin(angle), np.cos(angle)
        turned = points @ np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
        turns.append(project(turned.astype(np.float32))[0][:, 1])
    assert low == pytest.approx(np.min(turns), abs=1e-3)
    assert high == pytest.approx(np.max(turns), abs=1e-3)
    assert high - low < 1.2  # of 2: it is flat
    sphere = np.random.default_rng(0).normal(size=(20_000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    assert upright(sphere) == pytest.approx((-1, 1), abs=1e-3)
    assert upright(7 * sphere) == pytest.approx(upright(sphere))  # what is far outside does not make a row higher


def test_panels_of_one_frame_have_one_scale():
    small, large = cloud().numpy() / 4, cloud().numpy()
    panel = Panel(small, np.zeros((300, 3), np.uint8), frame=large).fitted()
    assert np.linalg.norm(panel.points, axis=1).max() < 0.35
    alone = Panel(small, np.zeros((300, 3), np.uint8)).fitted()
    assert np.linalg.norm(alone.points, axis=1).max() == pytest.approx(1)
    assert Panel(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.uint8)).fitted().points.tolist() == [[0] * 3] * 2


def test_a_large_cloud_is_thinned_out():
    assert plain_panel(cloud(5000), "").points.shape == (MOST_POINTS, 3)


def test_a_picture_is_drawn_the_same_each_time(tmp_path):
    panels = [plain_panel(cloud(), f"number {i}") for i in range(5)]
    assert Picture(panels).width == 3
    assert Picture(panels, columns=9).width == 5
    assert Picture(panels[:1]).width == 1
    for name, some in (("a", panels), ("b", panels), ("c", panels[:1])):
        picture = Picture(some, "a heading", legend=[("#ff0000", "red")])
        save_figure(tmp_path / f"{name}.png", clouds_figure(picture))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = imread(tmp_path / "a.png")
    assert image.shape[1] == pytest.approx(3 * 2.3 * 130, abs=2)
    third = image.shape[1] // 3
    for column in range(3):
        assert (image[:, column * third : (column + 1) * third, :3].min(-1) < 0.9).mean() > 0.01
    assert drawn(tmp_path / "c.png") > 0.01


@pytest.mark.parametrize("count", [1, 6, 17, 40, 55])
def test_a_palette_has_different_colours(count):
    assert len(set(palette(count))) == count
    assert all(len(colour) == 7 for colour in palette(count))


def test_patches_are_the_model_s():
    points = cloud()
    found = cut(points, 8, 12)
    patches, centers, members = make_patches(points[None], 8, 12)
    assert torch.equal(found.members, members[0])
    torch.testing.assert_close(found.centers, centers[0])
    torch.testing.assert_close(points[found.members] - found.centers[:, None], patches[0])
    for point in range(300):
        mine = [g for g in range(8) if point in found.members[g]]
        nearest = min(mine, key=lambda g: (points[point] - found.centers[g]).norm().item(), default=-1)
        assert found.owner[point] == nearest
    panels = patch_panels(points, found, "x")
    assert [len(panel.points) for panel in panels] == [308, 300, 96]
    covered = len(found.members.unique()) / 3
    assert f"{covered:.0f} % of the points" in panels[1].title
    with pytest.raises(ValueError, match="1 to 300"):
        cut(points, 301, 4)


def test_mistakes_are_sorted_by_confidence():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 5, generator=generator) * 3, torch.randint(5, (200,), generator=generator)
    logits[:20] = logits[0]  # equally sure ones
    every = confident_mistakes(logits, labels)
    assert len(every) == int((logits.argmax(1) != labels).sum())
    confidences = [one.confidence for one in every]
    assert confidences == sorted(confidences, reverse=True)
    for one in every:
        probabilities = logits[one.index].double().softmax(0)
        assert one.truth == labels[one.index] != one.predicted == probabilities.argmax()
        assert (one.confidence, one.of_truth) == (probabilities[one.predicted], probabilities[one.truth])
    assert confident_mistakes(logits, labels, 7) == every[:7]
    ties = [one.index for one in every if one.index < 20]
    assert ties == sorted(ties)
    assert not confident_mistakes(torch.eye(3), torch.arange(3))
    title = mistake_title(every[0], ("a", "b", "c", "d", "e"))
    assert f"predicted: {'abcde'[every[0].predicted]}, {100 * confidences[0]:.1f} %" in title


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embeddings_keep_classes_apart(method):
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8) * 0.1 + 5 * torch.eye(8)[labels]
    for dimensions in (2, 3):
        places = embed(features, method, dimensions)
        assert places.shape == (60, dimensions)
        assert (places == embed(features, method, dimensions)).all()
        distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(60)
        alike = (labels[distances.argmin(1)] == labels).float().mean()
        assert alike > (0.9 if method == "pca" or dimensions == 2 else 0.6)  # by chance: a third
    assert of_figure(embedding_figure(embed(features, method), labels, ["a", "b", "c", "none"], "t")) > 0.002
    picture = embedding_picture(places, labels, ["a", "b", "c", "none"], "t")
    assert [text for _, text in picture.legend] == ["a", "b", "c"]
    assert len(picture.panels[0].points) == 60
    with pytest.raises(ValueError, match="at least 4"):
        embed(features[:3], method)


@pytest.mark.parametrize(
    "names", [tuple(OFFICIAL), tuple(CLASSES.values()), [f"a_class_of_my_own_number_{i}" for i in range(120)]], ids=len
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_the_names_of_many_classes_do_not_overlap(names, spread):
    """Of ModelNet40, ShapeNet-55 and a set of long names, however near each other the classes are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(names)).repeat(4)
    middles = spread * torch.randn(len(names), 2, generator=generator)
    places = middles[labels] + torch.randn(len(labels), 2, generator=generator)
    figure = embedding_figure(places.numpy(), labels, names, "a title $x_1")
    figure.draw_without_rendering()
    axes = figure.findobj(Axes)[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(names)
    overlaps = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not overlaps
    frame = figure.bbox
    for box in [*boxes, axes.title.get_window_extent()]:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_embeddings_of_hardly_anything(method, dimensions):
    """Equal objects are in one place, and a missing dimension is 0."""
    assert (embed(torch.ones(5, 8), method, dimensions) == np.zeros((5, dimensions))).all()
    assert np.isfinite(embed(torch.randn(6, 1), method, dimensions)).all()
    assert embed(torch.randn(6, 1), method, dimensions).shape == (6, dimensions)
    assert embed(torch.randn(4, 2), method, dimensions).shape == (4, dimensions)
    assert np.isfinite(embed(torch.randn(5, 24).repeat(2, 1), method, dimensions)).all()
    with pytest.raises(ValueError, match="NaN"):
        embed(torch.full((5, 8), torch.nan), method, dimensions)


def test_pca_is_the_directions_of_largest_variance():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    features[:, 1] += features[:, 0]  # correlated, so that scaling does not level it
    x = (features - features.mean(0)) / features.std(0)
    expected = torch.linalg.svdvals(x)[:2] ** 2
    assert (embed(features, "pca") ** 2).sum(0) == pytest.approx(expected.numpy(), rel=1e-6)


def test_distances_of_experts_against_a_loop():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = ewa.to_moe(torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), 3, "every_other")
    found = pairwise_distances(model)
    assert list(found) == list(moe_layers(model))
    assert len(found) == 2
    for name, moe in moe_layers(model).items():
        one = [torch.cat([p[i].flatten() for p in moe.experts.parameters()]).double() for i in range(3)]
        mean = sum(one) / 3
        for i in range(3):
            for j in range(3):
                assert found[name][i, j].item() == pytest.approx(((one[i] - one[j]).norm() / mean.norm()).item())
        # and from them the disagreement, sum_i ||W_i - m|| / ||m||
        total = sum((w - mean).norm() for w in one) / mean.norm()
        assert ewa.disagreement(model)[name] == pytest.approx(total.item(), rel=1e-5)
    assert of_figure(experts_figure({"blocks.1.mlp": [(1, 0.5), (2, 0.1)]}, found, "t")) > 0.05


@pytest.mark.parametrize(
    ("scale", "expected", "unit"),
    [
        (1e-5, "1.2 to 3.2", r"$\times\,10^{-5}$"),
        (0.1, "0.12 to 0.32", ""),
        (10.0, "12 to 32", ""),
        (1000.0, "1.2 to 3.2", r"$\times\,10^{3}$"),
    ],
)
def test_distances_of_experts_are_rounded_as_a_person_would(scale, expected, unit):
    """The shades show them; two numbers a layer say how far they go."""
    matrix = scale * torch.tensor([[0, 1.234, 3.2], [1.234, 0, 2], [3.2, 2, 0]], dtype=torch.float64)
    figure = experts_figure({}, {"blocks.1.mlp": matrix}, "t")
    _, grid, bar = figure.findobj(Axes)
    assert not grid.texts
    assert grid.get_title() == f"block 1: {expected}"
    label = bar.get_ylabel()
    assert label.startswith("distance of two experts /\nnorm of their mean")
    assert label.endswith(f", {unit}" if unit else "mean")
    top = 3.2 if unit else 3.2 * scale
    assert bar.get_ylim() == pytest.approx((0, top))


def test_equal_experts_are_drawn_too():
    figure = experts_figure({}, {"blocks.1.mlp": torch.zeros(2, 2)}, "t")
    assert figure.findobj(Axes)[1].get_title() == "block 1: all equal"


def test_metrics_are_read_up_to_where_they_were_cut_off(tmp_path):
    lines = ['{"epoch": 0, "ewa/disagreement/b.1": 4.0, "train/loss": 3}', "{}", "[1]", '{"epoch": "x"}',
             '{"epoch": 1, "ewa/disagreement/b.1": 2.0}', '{"epoch": 2, "ewa/dis']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert disagreements(read_metrics(tmp_path)) == {"b.1": [(1, 4.0), (2, 2.0)]}


def test_reconstructions_have_one_scale_a_row():
    arch = Architecture(width=24, depth=1, heads=2, num_groups=8, group_size=6, patch_width=8, patch_out=24)
    model = MaskedAutoencoder(arch, 0.5, 1).eval()
    found = model.reconstruct(torch.stack([cloud(60), cloud(60) * 3]))
    picture = reconstruction_picture(found, ["a", "b"])
    assert [len(panel.points) for panel in picture.panels] == [24, 48, 48] * 2
    assert picture.width == 3
    assert picture.panels[0].title == "a\nmasked input: 4 of 8 patches"
    shown, _ = stacked([(found.visible[1], "#000000"), (found.true[1], "#000000")])
    assert (picture.panels[5].points == shown).all()
    assert all((panel.frame == shown).all() for panel in picture.panels[3:])
    assert of_figure(clouds_figure(reconstruction_picture(found))) > 0.01
    far = Reconstruction(found.visible, found.predicted + 50, found.true)  # a prediction off the sheet does no harm
    assert of_figure(clouds_figure(reconstruction_picture(far))) > 0.01


def test_a_reconstruction_of_all_patches_has_no_masked_input():
    sizes = TokenizerSizes(num_groups=8, group_size=8, patch_width=8, patch_out=16, codebook_size=8, codebook_width=8,
                           graph_width=4, feature_width=8, folding_width=8)  # fmt: skip
    found = DiscreteVAE(sizes).eval().reconstruct(torch.stack([cloud(60), cloud(60) * 3]))
    picture = reconstruction_picture(found, ["a", "b"])
    assert [panel.title for panel in picture.panels] == ["a\nprediction", "truth", "b\nprediction", "truth"]
    assert picture.width == 2
    assert [name for _, name in picture.legend] == ["predicted", "patches as they are"]
    truth = torch.as_tensor(picture.panels[1].points)
    assert sorted(map(tuple, truth.tolist())) == sorted(map(tuple, found.true[0].flatten(0, 1).tolist()))
    assert of_figure(clouds_figure(picture)) > 0.01


def test_a_window_has_all_clouds_side_by_side():
    panels = [plain_panel(cloud(50), str(i)) for i in range(3)]
    points, colours, sizes = placed(Picture(panels, columns=2))
    assert points.shape == colours.shape == (150, 3)
    assert sizes.tolist() == [1] * 150
    assert 0 <= colours.min() < colours.max() <= 1
    first, second, third = np.split(points, 3)
    assert np.allclose(second - first, [2.3, 0, 0])
    assert np.allclose(third - first, [0, -2.3, 0])
    assert np.allclose(np.linalg.norm(first, axis=1).max(), 1)
