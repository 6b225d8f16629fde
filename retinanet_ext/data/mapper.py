"""Detectron2's dataset mapper, with errors that name the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import transform_instance_annotations
from fvcore.transforms.transform import TransformList

from retinanet_ext.data.coco_json import find_image_fault
from retinanet_ext.errors import InputError


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's mapper, except for the following.

    - Crowd regions, which Detectron2 leaves out, become ``ignore_boxes``, (M, 4).
    - An error names its image. It is an :class:`InputError` where the image cannot be used.

    The latter is needed although data are checked before training: of large sets only the headers
    are, and a file can become unreadable while training runs.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        if cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "RetinaNetExt"):
            cfg = cfg.clone()
            cfg.defrost()
            # Of which these read nothing, and boxes alone are loaded.
            cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
        return super().from_config(cfg, is_train)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            get = dataset_dict.get
            name, text = f"image {get('file_name')} (image id {get('image_id')})", str(error)
            if isinstance(error, MemoryError):
                raise MemoryError(f"{name}: {text}") from error
            fault = find_image_fault(dataset_dict, self.image_format)
            if fault is None and isinstance(error, ValueError):  # of an augmentation
                fault = f"{text} (it has {get('width')} x {get('height')} pixels)"
            if fault is not None:
                raise InputError(f"{name} cannot be used: {fault}") from error
            # Likely of a mapper's or an augmentation's code, whose traceback is needed.
            raise RuntimeError(f"{name}: {type(error).__name__}: {text}") from error

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        crowd = (a for a in dataset_dict["annotations"] if a.get("iscrowd", 0))
        boxes = ({"bbox": a["bbox"], "bbox_mode": a["bbox_mode"]} for a in crowd)
        regions = [
            transform_instance_annotations(b, transforms, image_shape)["bbox"] for b in boxes
        ]
        dataset_dict["ignore_boxes"] = torch.tensor(np.array(regions)).float().reshape(-1, 4)
        super()._transform_annotations(dataset_dict, transforms, image_shape)
