"""Detectron2's dataset mapper, with errors that name the image."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper

from retinanet_ext.data.coco_json import find_image_fault
from retinanet_ext.errors import InputError


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's mapper; an image that cannot be used ends in an :class:`InputError`.

    Needed although data are checked before training: of large sets only the headers are, and a
    file can become unreadable while training runs.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            fault = find_image_fault(dataset_dict, self.image_format)
            if fault is None:
                raise
            raise InputError(
                f"image {dataset_dict['file_name']} (image id {dataset_dict.get('image_id')}) "
                f"cannot be used: {fault}"
            ) from error
