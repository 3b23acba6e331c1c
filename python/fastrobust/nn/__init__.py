"""Networks of fixed signs and learned masks (thesis, section 5.1)."""

from . import zoo
from .allocate import allocate
from .compact import compact, dead_channels
from .convert import convert, dense_copy, dense_state_dict
from .freeze import FrozenModel, freeze
from .masked import INITIALISATIONS, BinaryMaskedConv2d, BinaryMaskedLinear, masked_layers, update_masks
from .resnet import ResNet, resnet18, resnet34, small_cnn
from .storage import load_packed, pack, save_packed

__all__ = [
    "INITIALISATIONS",
    "BinaryMaskedConv2d",
    "BinaryMaskedLinear",
    "FrozenModel",
    "ResNet",
    "allocate",
    "compact",
    "convert",
    "dead_channels",
    "dense_copy",
    "dense_state_dict",
    "freeze",
    "load_packed",
    "masked_layers",
    "pack",
    "resnet18",
    "resnet34",
    "save_packed",
    "small_cnn",
    "update_masks",
    "zoo",
]
