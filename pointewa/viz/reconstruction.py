"""Input, prediction and truth of a model that reconstructs patches, of masked ones or of all."""

from collections.abc import Sequence

from pointewa.models import Reconstruction
from pointewa.viz.panels import Panel, Picture, stacked

_SEEN, _PREDICTED, _TRUE = "#8a94a3", "#D55E00", "#0072B2"


def reconstruction_picture(clouds: Reconstruction, names: Sequence[str] = (), heading: str = "") -> Picture:
    """A row a cloud, all at one scale: visible patches, these with the predicted ones, these with the true ones.

    Without visible patches there are two panels a row.

    Args:
        clouds: of `MaskedAutoencoder.reconstruct` or `DiscreteVAE.reconstruct`, y up.
        names: of the objects, or none.
        heading: above the picture.
    """
    panels = []
    whole = clouds.visible.shape[1] == 0
    masked, groups = clouds.true.shape[1], clouds.true.shape[1] + clouds.visible.shape[1]
    for row, (seen, predicted, true) in enumerate(zip(clouds.visible, clouds.predicted, clouds.true, strict=True)):
        frame, _ = stacked([(seen, _SEEN), (true, _TRUE)])
        name = f"{names[row]}\n" if names else ""
        shown = [("prediction", [(predicted, _PREDICTED)]), ("truth", [(true, _TRUE)])]
        if whole:
            shown[0] = (f"{name}prediction", shown[0][1])
        else:
            shown.insert(0, (f"{name}masked input: {groups - masked} of {groups} patches", []))
        for title, added in shown:
            points, colours = stacked([(seen, _SEEN), *added])
            panels.append(Panel(points, colours, title, frame=frame))
    if whole:
        return Picture(panels, heading, 2, ((_PREDICTED, "predicted"), (_TRUE, "patches as they are")))
    legend = ((_SEEN, "visible patches"), (_PREDICTED, "predicted"), (_TRUE, "masked, as they are"))
    return Picture(panels, heading, 3, legend)
