"""Detectron2's dataset mapper, for images of any depth, with errors that name the image."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image, transform_instance_annotations
from detectron2.data.transforms import AugInput
from fvcore.transforms.transform import TransformList

from retinanet_ext.data.augmentation import build_augmentations
from retinanet_ext.data.images import ImageReader, explain_unreadable, find_size_fault
from retinanet_ext.errors import InputError


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with the following differences.

    - :class:`~retinanet_ext.data.images.ImageReader` reads the images.
    - Crowd regions, which Detectron2 leaves out, become ``ignore_regions``: (M, 4) XYXY in pixels
      of the augmented image.
    - Every error names its image.
    - Proposals are not supported.

    Errors are possible although the data are checked before training, because only the headers of
    large data sets are read, and because a file can become unreadable while training runs.

    Calling the mapper with a dataset dict returns Detectron2's dict for the model: ``image``, an
    (C, H, W) tensor, ``instances`` and ``ignore_regions`` in training, and the dict's other fields.

    Raises:
        InputError: the image cannot be read, differs in size from its dict, or cannot be resized.
    """

    @configurable
    def __init__(self, is_train: bool, *, reader: ImageReader | None = None, **kwargs: Any) -> None:
        """
        Args:
            is_train: whether annotations are mapped too.
            reader: reads the images; by default as Detectron2 reads them.
            kwargs: as in Detectron2.
        """
        super().__init__(is_train, **kwargs)
        self.reader = reader or ImageReader(self.image_format)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        if cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "RetinaNetExt"):
            cfg = cfg.clone()
            cfg.defrost()
            # These models use boxes only.
            cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
        arguments = super().from_config(cfg, is_train)
        if is_train:
            arguments["augmentations"] = build_augmentations(cfg, arguments["augmentations"])
        return {**arguments, "reader": ImageReader.from_config(cfg)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        name = f"image {dataset_dict['file_name']} (image id {dataset_dict.get('image_id')})"
        try:
            image = self.reader(dataset_dict["file_name"])
        except MemoryError as error:
            raise MemoryError(f"{name}: {error}") from error
        except Exception as error:  # Pillow's decoders raise many types
            raise InputError(f"{name} cannot be used: {explain_unreadable(error)}") from error
        if fault := find_size_fault(dataset_dict, image.shape[1::-1]):
            raise InputError(f"{name} cannot be used: {fault}")
        try:
            return self._map(dataset_dict, image)
        except ValueError as error:  # for example of a resize to no pixels
            height, width = image.shape[:2]
            raise InputError(
                f"{name} of {width} x {height} pixels cannot be used: {explain_unreadable(error)}"
            ) from error
        except MemoryError as error:
            raise MemoryError(f"{name}: {error}") from error
        except Exception as error:  # an error in the code of an augmentation needs its traceback
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    def _map(self, dataset_dict: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
        """Augment an image and its annotations as Detectron2's mapper does."""
        dataset_dict = copy.deepcopy(dataset_dict)
        height, width = image.shape[:2]
        dataset_dict = {"height": height, "width": width, **dataset_dict}
        sem_seg = None
        if "sem_seg_file_name" in dataset_dict:
            sem_seg = read_image(dataset_dict.pop("sem_seg_file_name"), "L").squeeze(2)
        inputs = AugInput(image, sem_seg=sem_seg)
        inputs.is_turned = dataset_dict.pop("is_turned", None)
        transforms = self.augmentations(inputs)
        tensor = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        # YUV images are float64, which a float32 model does not accept.
        dataset_dict["image"] = tensor.float() if tensor.is_floating_point() else tensor
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, inputs.image.shape[:2])
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        crowd = (a for a in dataset_dict["annotations"] if a.get("iscrowd", 0))
        boxes = ({"bbox": a["bbox"], "bbox_mode": a["bbox_mode"]} for a in crowd)
        regions = [
            transform_instance_annotations(b, transforms, image_shape)["bbox"] for b in boxes
        ]
        dataset_dict["ignore_regions"] = torch.tensor(np.array(regions)).float().reshape(-1, 4)
        super()._transform_annotations(dataset_dict, transforms, image_shape)
