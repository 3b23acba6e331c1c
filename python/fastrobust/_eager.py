"""Calls that torch.compile leaves to Python."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_frames: Any = torch._C._dynamo.eval_frame
_callback: Callable[[], Any] = getattr(_frames, "get_eval_frame_callback", lambda: True)
F = TypeVar("F", bound=Callable[..., Any])


def left_to_python(f: F) -> F:
    """``torch.compiler.disable(f)`` without its import of torch._dynamo, which takes a second.

    For what runs a model and looks at values: a function under torch.compile that calls it has a graph before and one
    after. Models that are compiled themselves stay so inside.
    """
    disabled: Any = None

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules or _callback() is None:
            return f(*args, **kwargs)
        disabled = disabled or torch.compiler.disable(f)
        return disabled(*args, **kwargs)

    marked: Any = call
    marked._torchdynamo_disable = True  # callers are not traced into it
    marked._torchdynamo_disable_msg = f"fastrobust: {f.__name__} runs a model and looks at values"
    _skip(marked.__code__)  # and its own frame is not traced
    return cast(F, marked)


def _skip(code: types.CodeType) -> None:
    """What torch._dynamo does with its own wrappers. Without it they would be traced, for nothing."""
    if hasattr(_frames, "skip_code"):  # older torch
        _frames.skip_code(code)
    elif hasattr(_frames, "_FrameExecStrategy"):
        action = _frames._FrameAction
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
