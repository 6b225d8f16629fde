"""Augmentations of the training images beyond Detectron2's keys, built from its transforms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, Transform, TransformList


class ScaleJitter(T.Augmentation):
    """Scale the image by a random factor and crop it, at a random place, to its original size.

    An image that has become smaller is not padded; the batch is. ("Large-scale jitter" of
    arXiv 2012.07177, section 4, on images of any aspect ratio.)
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        factor = self._rand_range(self.low, self.high)
        new_height, new_width = (max(1, round(side * factor)) for side in (height, width))
        resize = T.ResizeTransform(height, width, new_height, new_width)
        crop_height, crop_width = min(height, new_height), min(width, new_width)
        top = np.random.randint(new_height - crop_height + 1)
        left = np.random.randint(new_width - crop_width + 1)
        crop = CropTransform(left, top, crop_width, crop_height, new_width, new_height)
        return TransformList([resize, crop])


class QuarterTurns(T.Augmentation):
    """Turn the image by 90 or 270 degrees if ``is_turned``, else by 0 or 180.

    The training loader sets ``is_turned`` if it groups by aspect ratio, because its batches then
    hold images of one orientation. Otherwise it is None, and drawn here.
    """

    def __init__(self) -> None:
        super().__init__()  # Detectron2 logs an augmentation by the signature of this method

    def get_transform(self, image: np.ndarray, is_turned: bool | None) -> Transform:
        if is_turned is None:
            is_turned = np.random.rand() < 0.5
        angle = 90 * is_turned + 180 * np.random.randint(2)
        return _QuarterTurn(*image.shape[:2], angle) if angle else T.NoOpTransform()


class _QuarterTurn(T.RotationTransform):
    """Detectron2's rotation without OpenCV, which drops the axis of a single channel."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return np.rot90(img, self.angle // 90)


class _RandomSaturationOfBGR(T.RandomSaturation):
    """Detectron2's, which computes the luminance of RGB."""

    def get_transform(self, image: np.ndarray) -> Transform:
        return super().get_transform(image[:, :, ::-1])


SATURATION = {"RGB": T.RandomSaturation, "BGR": _RandomSaturationOfBGR}
"""``INPUT.FORMAT`` -> change of saturation; the other formats have none."""


def build_augmentations(cfg: CfgNode, augmentations: Sequence[T.Augmentation]) -> list:
    """Return Detectron2's augmentations with those of the plugin's ``INPUT`` keys after them."""
    extended = list(augmentations)
    low, high = cfg.INPUT.SCALE_JITTER
    if (low, high) != (1.0, 1.0):
        extended.append(ScaleJitter(low, high))
    if cfg.INPUT.VERTICAL_FLIP:
        extended.append(T.RandomFlip(horizontal=False, vertical=True))
    if cfg.INPUT.QUARTER_TURNS:
        extended.append(QuarterTurns())
    if jitter := cfg.INPUT.COLOR_JITTER:
        changes = [T.RandomBrightness, T.RandomContrast]
        if cfg.INPUT.FORMAT in SATURATION:
            changes.append(SATURATION[cfg.INPUT.FORMAT])
        extended += [change(1 - jitter, 1 + jitter) for change in changes]
    return extended
