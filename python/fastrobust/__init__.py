"""fastrobust: compiled kernels for adversarial robustness in PyTorch."""

import torch as _torch  # before the extension: its kernels run on torch's threads  # noqa: F401

from . import _C, _version

__version__: str = _C.__version__  # with the local part that says what is compiled in: +cpu, +cu130
if __version__.partition("+")[0] != _version.__version__:
    raise ImportError(
        f"fastrobust {_version.__version__} found a compiled module of version {__version__}; "
        "reinstall the package (pip install --force-reinstall .)"
    )

from . import analysis, attacks, bounds, certify, data, models, nn, ops, reference, training  # noqa: E402
from ._info import build_info  # noqa: E402
from ._record import ModelMismatchError, UnreadableModelError  # noqa: E402

__all__ = [
    "ModelMismatchError",
    "UnreadableModelError",
    "__version__",
    "analysis",
    "attacks",
    "bounds",
    "build_info",
    "certify",
    "data",
    "models",
    "nn",
    "ops",
    "reference",
    "training",
]
