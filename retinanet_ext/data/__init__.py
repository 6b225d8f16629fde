"""The data a config names: checked, registered in Detectron2's catalogs, or drawn on the spot."""

from retinanet_ext.data.mapper import CheckedDatasetMapper
from retinanet_ext.data.register import prepare_datasets
from retinanet_ext.data.sample_set import SampleSet, make_sample_set

__all__ = ["CheckedDatasetMapper", "SampleSet", "make_sample_set", "prepare_datasets"]
