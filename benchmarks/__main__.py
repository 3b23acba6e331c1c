"""``python -m benchmarks [SUITE ...]``: the same as ``fastrobust bench``."""

import sys

from .cli import run_from_argv

if __name__ == "__main__":
    sys.exit(run_from_argv(sys.argv[1:]))
