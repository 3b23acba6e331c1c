"""One registry of op schemas: ``torch.library`` definitions, their kernels, fakes and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C

library = torch.library.Library("fastrobust", "DEF")


# What torch.autograd.graph.increment_version calls; torch 2.6 has it.
_increment_version = torch._C._increment_version


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Run an op's kernel without recording: its autograd is written by hand, or it has none."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def is_recorded() -> bool:
    """True while a graph is made of what runs: torch.compile, export, jit.trace, and modes that see every operator."""
    return _is_compiling() or _tracing() is not None or bool(_dispatch_modes())


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,),
) -> Callable[..., Any]:
    """Define ``fastrobust::name``; returns what to call.

    ``kernel`` serves CPU and CUDA. Without ``autograd`` the op is not differentiable: its outputs never require grad.
    Of an op that writes, the last argument is what it writes to; raw writes are invisible to autograd, so its version
    is raised here, whichever way the call goes: else a tensor saved for backward would be used after it changed.
    What is returned calls ``kernel`` itself, which saves the dispatcher's 5 us or more, when nothing intercepts and no
    gradient is wanted; otherwise the registered op.
    """
    library.define(name + schema, tags=tags)
    op = getattr(torch.ops.fastrobust, name).default
    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"fastrobust::{name}", fake, lib=library)
    library.impl(name, autograd or (lambda *args: below_autograd(op, *args)), "Autograd")
    writes = op._schema.is_mutable
    if writes:

        def raise_version(keys: Any, *args: Any) -> Any:
            _increment_version((args[-1],))
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

        library.impl(name, raise_version, "ADInplaceOrView", with_keyset=True)

    def call(*args: Any) -> Any:
        if not (nothing_intercepts() and all(map(_is_direct, args))):
            return op(*args)
        result = kernel(*args)
        if writes:
            _increment_version((args[-1],))
        return result

    call.op = op  # type: ignore[attr-defined]
    return call


def _is_direct(arg: Any) -> bool:
    """Not a tensor, or one that nothing needs to know of: no subclass, no gradient wanted."""
    if type(arg) is torch.Tensor:
        wanted = arg.requires_grad and torch.is_grad_enabled()
        return (arg.is_cpu or arg.is_cuda) and not wanted and not arg.is_neg()
    if isinstance(arg, (list, tuple)):
        return all(map(_is_direct, arg))
    return not isinstance(arg, torch.Tensor)


_is_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack


def nothing_intercepts() -> bool:
    """True when no tracing, mode or transform is active, so that the compiled module may be called directly."""
    return (
        not _is_compiling()
        and _tracing() is None
        and not _dispatch_modes()
        and not _function_modes()
        and _functorch_level() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """True inside torch.func's transforms and forward-mode differentiation."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


class _NoSecondDerivative(torch.autograd.Function):
    """A first derivative as it is, tied to what it was computed from: differentiating it again raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Any, *sources: Any) -> Any:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fastrobust: this op has first derivatives alone, but a derivative of one was asked for")


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function without second derivatives: they raise.

    torch's once_differentiable raises only where the incoming gradient requires grad: under create_graph with a
    constant one, the second derivatives through the saved tensors would be missing without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        sources = (*ctx.saved_tensors, *grads)
        return tuple(None if v is None else _NoSecondDerivative.apply(v, *sources) for v in results)

    return wrapper


def stream_of(device: torch.device) -> tuple[int, int]:
    """(device index or -1 for the CPU, raw stream)."""
    if device.type == "cpu":
        return -1, 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def on_cpu(t: Tensor) -> bool:
    """Whether the CPU's own ways serve; tests that emulate CUDA on the CPU put another answer here."""
    return t.is_cpu


class full_precision:
    """No TF32 inside: a bound in TF32 is no bound; and the vendor's convolutions give the same bits in every run.
    Nothing where t is on the CPU, or while a graph is made."""

    def __init__(self, t: Tensor):
        self.cuda = t.device.type == "cuda" and not _is_compiling()

    def __enter__(self) -> None:
        if self.cuda:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            self.saved = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = self.saved


def require_cuda_build(device: torch.device) -> None:
    """Clear error for CUDA tensors when this build has no CUDA kernels."""
    if device.type == "cuda" and not _C.cuda_toolkit:
        raise RuntimeError(
            "fastrobust was built without CUDA kernels, but a CUDA tensor came; "
            "reinstall where nvcc is on PATH (fastrobust info says what was built)"
        )
