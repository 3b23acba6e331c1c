"""Smaller models with the same function: channels that carry nothing are cut out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from .freeze import Tracer, is_relu, norm_affine
from .masked import BinaryMaskedConv2d, masked_layers


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode without the dead inner channels, the same function of its input.

    A channel between two masked convolutions (batch normalisation and ReLU may lie between, nothing else may read it) is
    dead when no kept weight of the second reads it, or when no kept weight of the first makes it and what batch
    normalisation and ReLU turn its zeros into is exactly zero. A constant that is not zero stays: under zero padding it
    is no constant at the border. Removing channels can kill others, so this goes on until nothing changes; one channel
    is always left. Outputs are equal up to the order of float32 sums.

    Only for models whose scores are settled: the scores and signs of cut channels are gone, while dead channels of a
    model in training can revive. Raises ValueError for a model that torch.fx cannot trace.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"model: expected one that torch.fx can trace, got {type(model).__name__}: {error}") from error
    links = _links(graph, model)
    while any(_cut(model, *link) for link in links):
        pass
    return model


def _links(graph: fx.Graph, model: nn.Module) -> list[tuple[str, str | None, bool, str]]:
    """(first convolution, batch normalisation, whether a ReLU follows, second convolution) by name."""
    modules = dict(model.named_modules())

    def module(node: fx.Node) -> nn.Module | None:
        return modules[str(node.target)] if node.op == "call_module" else None

    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    found = []
    for node in graph.nodes:
        if not isinstance(module(node), BinaryMaskedConv2d):
            continue
        norm, relu, at = None, False, node
        while len(at.users) == 1:
            at = next(iter(at.users))
            other = module(at)
            if isinstance(other, nn.BatchNorm2d) and norm is None and not relu and other.running_mean is not None:
                norm = str(at.target)
            elif is_relu(at, other):
                relu = True
            elif not isinstance(other, nn.Identity):
                break
        last = module(at)
        names = [str(node.target), str(at.target), *([norm] if norm else [])]
        # A module that is called twice cannot be cut for one of its calls.
        if isinstance(last, BinaryMaskedConv2d) and at is not node and all(calls[n] == 1 for n in names):
            found.append((str(node.target), norm, relu, str(at.target)))
    return found


def _cut(model: nn.Module, first: str, norm: str | None, relu: bool, second: str) -> bool:
    """Cut the dead channels of one link; whether there were any."""
    a, b = model.get_submodule(first), model.get_submodule(second)
    assert isinstance(a, BinaryMaskedConv2d) and isinstance(b, BinaryMaskedConv2d)
    if a.geometry().groups != 1 or b.geometry().groups != 1 or a.out_channels <= 1:
        return False
    made = (a.packed().to_dense() != 0).flatten(1).any(1)
    read = (b.packed().to_dense() != 0).any(0).flatten(1).any(1)
    # What an empty row becomes: its bias, normalised.
    constant = a.scores.new_zeros(a.out_channels) if a.bias is None else a.bias.clone()
    if norm is not None:
        alpha, beta = norm_affine(model.get_submodule(norm))
        constant = constant * alpha + beta
    if relu:
        constant = constant.relu()
    alive = read & (made | (constant != 0))
    if not bool(alive.any()):
        alive[0] = True
    if bool(alive.all()):
        return False
    _slice(model, first, alive, 0)
    _slice(model, second, alive, 1)
    if norm is not None:
        _slice_norm(model, norm, alive)
    return True


def _slice(model: nn.Module, name: str, alive: Tensor, dim: int) -> None:
    """Keep the `alive` channels of a convolution. The kept scores of the rest stay the largest, so a count suffices."""
    old = model.get_submodule(name)
    assert isinstance(old, BinaryMaskedConv2d)
    index = alive.nonzero().flatten()
    mask = old.mask().index_select(dim, index)
    g = old.geometry()
    sizes = [old.in_channels, old.out_channels]
    sizes[1 - dim] = index.numel()
    new = BinaryMaskedConv2d(
        sizes[0], sizes[1], old.kernel_size, g.stride, g.padding, g.dilation, g.groups, old.bias is not None,
        keep=int(mask.sum()), absolute=old.absolute, device=old.scores.device,
        dtype=old.scores.dtype,
    )  # fmt: skip
    new.scores.copy_(old.scores.index_select(dim, index))
    new.signs.copy_(old.signs.index_select(dim, index))
    new.sign_seed = None
    new.magnitude.copy_(old.magnitude)
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias if dim == 1 else old.bias.index_select(0, index))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.eval())


def _slice_norm(model: nn.Module, name: str, alive: Tensor) -> None:
    old = model.get_submodule(name)
    assert isinstance(old, nn.BatchNorm2d)
    new = nn.BatchNorm2d(int(alive.sum()), old.eps, old.momentum, old.affine, True).to(alive.device)
    for key, value in old.state_dict().items():
        new.state_dict()[key].copy_(value[alive] if value.dim() else value)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.eval())


def dead_channels(model: nn.Module) -> dict[str, int]:
    """Output channels without a kept weight, by layer."""
    return {
        name: int((layer.packed().to_dense() == 0).flatten(1).all(1).sum())
        for name, layer in masked_layers(model).items()
    }
