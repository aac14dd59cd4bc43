"""How pictures become the input of a model."""

from torch import Tensor


def fitted(image: Tensor, size: int) -> Tensor:
    """An image uint8 ``[3, H, W]`` as ``[3, size, size]``: its shorter side resized to ``size``, and of the longer one
    the middle, as is usual for ImageNet."""
    if image.shape[1:] == (size, size):
        return image
    from torchvision.transforms.v2.functional import center_crop, resize

    return center_crop(resize(image, [size], antialias=True), [size, size])


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], which is how timm's own ViTs are trained."""
    return pixels.float() / 127.5 - 1
