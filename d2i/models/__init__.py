"""The networks, U-ViT and UniDiffuser, and reading and writing of their published weights."""

from d2i.models.presets import PRESETS, build_backbone, changed_sizes, name_sizes
from d2i.models.unidiffuser import UniDiffuser
from d2i.models.uvit import UViT
from d2i.models.weights.load import load_weights, read_state_dict, save_weights

__all__ = [
    "PRESETS",
    "UViT",
    "UniDiffuser",
    "build_backbone",
    "changed_sizes",
    "load_weights",
    "name_sizes",
    "read_state_dict",
    "save_weights",
]
