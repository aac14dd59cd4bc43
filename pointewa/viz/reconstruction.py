"""Masked input, prediction and truth of a masked autoencoder."""

from collections.abc import Sequence

from pointewa.models import Reconstruction
from pointewa.viz.panels import Panel, Picture, stacked

_SEEN, _PREDICTED, _TRUE = "#8a94a3", "#D55E00", "#0072B2"


def reconstruction_picture(clouds: Reconstruction, names: Sequence[str] = (), heading: str = "") -> Picture:
    """A row a cloud, all at one scale: visible patches, these with the predicted ones, these with the true ones.

    Args:
        clouds: of `MaskedAutoencoder.reconstruct`, y up.
        names: of the objects, or none.
        heading: above the picture.
    """
    panels = []
    masked, groups = clouds.true.shape[1], clouds.true.shape[1] + clouds.visible.shape[1]
    for row, (seen, predicted, true) in enumerate(zip(clouds.visible, clouds.predicted, clouds.true, strict=True)):
        frame, _ = stacked([(seen, _SEEN), (true, _TRUE)])
        name = f"{names[row]}\n" if names else ""
        for title, added in (
            (f"{name}masked input: {groups - masked} of {groups} patches", []),
            ("prediction", [(predicted, _PREDICTED)]),
            ("truth", [(true, _TRUE)]),
        ):
            points, colours = stacked([(seen, _SEEN), *added])
            panels.append(Panel(points, colours, title, frame=frame))
    legend = ((_SEEN, "visible patches"), (_PREDICTED, "predicted"), (_TRUE, "masked, as they are"))
    return Picture(panels, heading, 3, legend)
