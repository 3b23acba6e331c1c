"""Smaller models with the same function: channels that carry nothing are cut out."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._places import Constant
from .._record import UnreadableModelError, unwrapped
from . import _proof
from ._layers import Norm, affine
from ._observe import Call, observe
from ._program import Readers, is_whole
from ._snapshot import evaluating
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, masked_layers

# Of the images that are tried where no example is given.
_SIDES = (32, 28, 64, 224, 16, 8)


@torch.no_grad()
def compact(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of `model` in eval mode without the dead inner channels, the same function of its input.

    A channel between two masked convolutions (batch normalisation and ReLU may lie between, nothing else may read it)
    is dead when no kept weight of the second reads it, or when no kept weight of the first makes it and what batch
    normalisation and ReLU turn its zeros into is exactly zero. A constant that is not zero stays: under zero padding it
    is no constant at the border. Removing channels can kill others, so this goes on until nothing changes; one channel
    is always left. Outputs are equal up to the order of float32 sums.

    example: a batch as the model takes it; what happens between the convolutions is seen by running it, and the result
    is compared with the model on it. Without one, images or rows that fit the first masked layer are tried.

    Only for models whose scores are settled: the scores and signs of cut channels are gone, while dead channels of a
    model in training can revive. Raises ValueError where no example fits, UnreadableModelError for models that branch
    on values or draw random numbers, ModelMismatchError when the result is not the same function on the example.
    """
    source = unwrapped(model)
    small = copy.deepcopy(source).eval()
    links, x = _found(small, example)
    while any(_cut(small, *link) for link in links):
        pass
    with evaluating(source):
        _proof.outputs(lambda given: source(*given), [x], _proof.leaves(small(x)), True)
    return small


class _Itself:
    """A model in eval mode, to be recorded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)


Link = tuple[str, str | None, bool, str]


def _found(model: nn.Module, example: Tensor | None) -> tuple[list[Link], Tensor]:
    """The links of the model and what it was run on."""
    if example is not None:
        return _links(model, example), example
    problem: Exception | None = None
    for x in _tried(model):
        try:
            return _links(model, x), x
        except UnreadableModelError:
            raise
        except Exception as error:  # whatever a model says to images of another size
            problem = error
    raise ValueError(f"example: got none, expected one, as the model takes no input that was tried ({problem})")


def _tried(model: nn.Module) -> Iterator[Tensor]:
    first = next(
        (m for m in model.modules() if isinstance(m, (BinaryMaskedConv2d, BinaryMaskedLinear, nn.Conv2d))), None
    )
    device = next((layer.scores.device for layer in masked_layers(model).values()), None)
    if isinstance(first, BinaryMaskedLinear):
        yield _proof.wave(torch.empty(2, first.in_features, device=device))
    elif first is not None:
        for side in _SIDES:
            yield _proof.wave(torch.empty(2, first.in_channels, side, side, device=device))


def _links(model: nn.Module, x: Tensor) -> list[Link]:
    """(first convolution, batch normalisation, whether a ReLU follows, second convolution) by name."""
    call = Call((x,), {})
    work = observe(_Itself(model), call, call.tensors)
    names = {id(m): name for name, m in model.named_modules()}
    norms = {id(m.running_mean): (name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    readers = Readers(work)
    calls = collections.Counter(id(step.func) for step in work.steps if step.name == "leaf")
    # Of every tensor that was read, how often: the layer of one that is read twice cannot be cut for one of the calls.
    reads = collections.Counter(
        id(v.base) for step in work.steps for v in (*step.args, *step.kwargs.values()) if isinstance(v, Constant)
    )
    found: list[Link] = []
    for step in work.steps:
        first = step.func
        if step.name != "leaf" or not isinstance(first, BinaryMaskedConv2d):
            continue
        norm, relu, value = None, False, step.results[0]
        while value is not None and (at := readers.only(value)) is not None:
            follower = work.steps[at]
            if follower.name == "leaf" and isinstance(follower.func, BinaryMaskedConv2d):
                pair = (first, follower.func)
                once = first is not follower.func and all(calls[id(m)] == 1 and id(m) in names for m in pair)
                if once and is_whole(follower.args[0]):
                    found.append((names[id(first)], norm, relu, names[id(follower.func)]))
                break
            seen = Norm.of(follower, readers.uses)
            if seen is not None and is_whole(seen.source) and norm is None and not relu:
                name, owner = norms.get(id(seen.tensors[2].base), (None, None))
                if name is None or reads[id(seen.tensors[2].base)] != 1 or not _owns(owner, seen):
                    break
                norm = name
            elif follower.name == "relu" and is_whole(follower.args[0]):
                relu = True
            else:
                break
            value = follower.results[0]
    return found


def _owns(owner: nn.Module | None, norm: Norm) -> bool:
    """Whether all that was read is the module's own, and it has nothing else that would have to be cut."""
    assert isinstance(owner, nn.BatchNorm2d)
    mine = (owner.weight, owner.bias, owner.running_mean, owner.running_var)
    read = tuple(None if t is None else t.base for t in norm.tensors)
    known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return all(a is b for a, b in zip(mine, read, strict=True)) and set(owner.state_dict()) <= known


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
        m = model.get_submodule(norm)
        assert isinstance(m, nn.BatchNorm2d) and m.running_mean is not None and m.running_var is not None
        alpha, beta = affine(m.weight, m.bias, m.running_mean, m.running_var, m.eps)
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
    new.fix_weight(old.signs.index_select(dim, index))
    new.magnitude.copy_(old.magnitude)
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias if dim == 1 else old.bias.index_select(0, index))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.eval())


def _slice_norm(model: nn.Module, name: str, alive: Tensor) -> None:
    """Keep the `alive` channels; whatever else a subclass has stays."""
    norm = model.get_submodule(name)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.num_features = int(alive.sum())
    for key in ("weight", "bias"):
        old = getattr(norm, key)
        if old is not None:
            setattr(norm, key, nn.Parameter(old[alive], requires_grad=old.requires_grad))
    for key in ("running_mean", "running_var"):
        setattr(norm, key, getattr(norm, key)[alive])


def dead_channels(model: nn.Module) -> dict[str, int]:
    """Output channels without a kept weight, by layer."""
    return {
        name: int((layer.packed().to_dense() == 0).flatten(1).all(1).sum())
        for name, layer in masked_layers(model).items()
    }
