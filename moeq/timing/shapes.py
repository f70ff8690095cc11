"""Shapes of a model's quantizable weights from its configuration alone."""

import torch

from moeq.checkpoint.configuration import load_config
from moeq.checkpoint.model_class import model_class
from moeq.models.adapter import Adapter
from moeq.models.shapes import weight_shapes
from moeq.quant.spec import WeightShape


def model_shapes(name: str) -> list[WeightShape]:
    """Every quantizable weight of a model with its shape and the share of tokens that use it.

    Args:
        name: Folder or hub id.

    Raises:
        ValueError: There is no configuration, or one of a model that moeq does not know.
    """
    config = load_config(name)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
    return weight_shapes(Adapter(model))
