from typing import Any

__version__: str
cpu_variants: str
cuda_toolkit: str
cuda_architectures: str
compiler: str

def __getattr__(name: str) -> Any: ...
