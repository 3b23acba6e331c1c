"""Masked convolutions and the masks themselves."""

from .convolution import masked_conv2d, masked_linear
from .masks import pack, topk_mask, topk_masks

__all__ = ["masked_conv2d", "masked_linear", "pack", "topk_mask", "topk_masks"]
