"""Networks of fixed signs and learned masks (thesis, section 5.1)."""

from .allocate import allocate
from .convert import convert, dense_copy, dense_state_dict
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, masked_layers, update_masks
from .resnet import ResNet, resnet18, resnet34, small_cnn

__all__ = [
    "BinaryMaskedConv2d",
    "BinaryMaskedLinear",
    "ResNet",
    "allocate",
    "convert",
    "dense_copy",
    "dense_state_dict",
    "masked_layers",
    "resnet18",
    "resnet34",
    "small_cnn",
    "update_masks",
]
