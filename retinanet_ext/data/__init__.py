"""The data that a config names: checked, registered in Detectron2's catalogs, or drawn."""

import retinanet_ext.torch_jit  # noqa: F401
from retinanet_ext.data.findings import Finding, ValidationResult
from retinanet_ext.data.mapper import CheckedDatasetMapper
from retinanet_ext.data.register import prepare_datasets
from retinanet_ext.data.sample_set import SampleSet, make_sample_set
from retinanet_ext.data.validation import validate_coco

__all__ = [
    "CheckedDatasetMapper",
    "Finding",
    "SampleSet",
    "ValidationResult",
    "make_sample_set",
    "prepare_datasets",
    "validate_coco",
]
