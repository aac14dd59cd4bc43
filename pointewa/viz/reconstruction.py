"""What a masked autoencoder was shown, what it made of it, and what was there."""

from matplotlib.figure import Figure  # without pyplot: no display is looked for, no state is left

from pointewa.models import Reconstruction


def reconstruction_figure(clouds: Reconstruction) -> Figure:
    """A row a cloud, the y axis up: visible patches, these with the predicted ones, these with the true ones.

    Args:
        clouds: of `MaskedAutoencoder.reconstruct`.
    """
    rows = len(clouds.visible)
    figure = Figure((9, 2.6 * rows), layout="constrained")
    for row in range(rows):
        seen = clouds.visible[row].flatten(0, 1)
        for column, (title, added) in enumerate(
            (("masked input", None), ("prediction", clouds.predicted), ("truth", clouds.true))
        ):
            axes = figure.add_subplot(rows, 3, 3 * row + column + 1, projection="3d")
            for points, color in (
                (seen, "tab:gray"),
                (None if added is None else added[row].flatten(0, 1), "tab:orange"),
            ):
                if points is not None:
                    x, y, z = points.float().cpu().unbind(-1)
                    axes.scatter(x, -z, y, s=2, color=color, depthshade=False)
            axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
            axes.set_box_aspect((1, 1, 1), zoom=1.6)
            axes.view_init(elev=20, azim=-60)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title)
    return figure
