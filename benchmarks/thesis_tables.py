"""Tables 3.6 to 3.9 of Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks (PhD thesis,
EPFL, 2022), as printed, and the files of the networks that they are about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = "https://github.com/liuchen11/PolyEnvelope"
COLUMNS = ("CTE", "PGD", "CRE Lin", "CRE IBP", "CRE MIP", "ACB Lin", "ACB IBP", "ACB PEC")
MEANING = (
    "CTE: clean test error, PGD: attacked error, CRE: certified robust error (percent), ACB: average certified bound; "
    "by linear bounds (Lin), intervals (IBP), complete verification (MIP), polyhedral envelope certification (PEC)"
)
# of the published files: C- is L-, an l-inf file is called l1, the names of the models with curved activations differ
_FILE_METHODS = {
    "l-per": ("c-per",), "l-per+at": ("c-perat", "c-per+at"), "i-per+at": ("i-perat", "i-per+at"),
}  # fmt: skip
_FOLDERS = {"relu": ("relu",), "sigmoid": ("sigd", "sigmoid"), "tanh": ("tanh",)}


@dataclass(frozen=True)
class Printed:
    """A row of tables 3.6 to 3.8. figures: of ``COLUMNS``; those that the table has not are NaN. Table 3.8 has CROWN
    where the others have Fast-Lin."""

    table: str
    data: str
    network: str
    activation: str
    norm: str
    eps: float
    method: str
    figures: tuple[float, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.data} {self.network} {self.activation} {self.norm} {self.method}"

    def files(self) -> list[str]:
        """Names that the published checkpoint may have, each with the folder that must be above it."""
        size = "l2" if self.norm == "L2" else "l1"
        made = "sigd" if self.activation == "sigmoid" else self.activation
        stem = f"{self.data.removesuffix('10')}_{self.network}_{size}" if self.activation == "relu" else made
        methods = _FILE_METHODS.get(self.method, (self.method,))
        return [
            f"{folder}_{self.norm.lower()}/{stem}_{m}.ckpt" for folder in _FOLDERS[self.activation] for m in methods
        ]

    def published(self, folder: Path) -> Path | None:
        """The checkpoint in a copy of the authors' ``ckpts``, or of some of its files."""
        for name in self.files():
            above, _, file = name.partition("/")
            for path in sorted(folder.rglob(file)):
                if above in path.parts:
                    return path
        return None

    def trained(self, folder: Path) -> Path | None:
        """The weights as ``benchmarks.certified_training --save`` names them."""
        if self.data != "mnist" or self.activation != "relu":
            return None
        method = "crown-ibp" if self.method == "c-ibp" else self.method
        words = [*(["l2"] if self.norm == "L2" else []), *(["cnn"] if self.network == "cnn" else []), method]
        file = folder / f"{'_'.join(words)}.pt"
        return file if file.is_file() else None


_TABLES = """
3.6 mnist fc1 relu Linf 0.1
  plain    1.99 98.37 100 100 100 0 0 0
  at       1.42 9.00 97.94 100 100 0.0021 0 0.0099
  kw       2.26 8.59 12.91 69.20 10.90 0.0871 0.0308 0.0928
  ibp      1.65 9.67 87.27 15.20 12.36 0.0127 0.0848 0.0705
  c-ibp    1.98 9.50 67.39 14.45 11.39 0.0326 0.0855 0.0800
  mmr      2.11 17.82 33.75 99.88 24.90 0.0663 0.0001 0.0832
  mmr+at   2.04 10.39 17.64 95.09 14.10 0.0824 0.0049 0.0905
  l-per    1.60 7.45 11.71 92.89 7.69 0.0883 0.0071 0.0935
  l-per+at 1.81 7.73 12.90 99.90 8.22 0.0871 0.0001 0.0925
  i-per    1.60 6.28 11.96 93.33 8.10 0.0880 0.0067 0.0934
  i-per+at 1.54 7.15 13.96 98.55 8.48 0.0868 0.0014 0.0927
3.6 mnist cnn relu Linf 0.1
  plain    1.28 85.75 100 100 100 0 0 0
  at       1.02 4.75 91.91 100 100 0.0081 0 0.0189
  kw       1.21 3.03 4.44 100 4.40 0.0956 0 0.0971
  ibp      1.51 4.43 23.89 8.13 5.23 0.0761 0.0919 0.0872
  c-ibp    1.85 4.28 10.72 6.91 4.83 0.0893 0.0931 0.0928
  mmr      1.65 6.07 11.56 100 6.10 0.0884 0 0.0928
  mmr+at   1.19 3.35 9.49 100 3.60 0.0905 0 0.0939
  l-per    1.44 3.44 5.13 100 3.62 0.0949 0 0.0965
  l-per+at 0.50 2.02 4.85 100 2.21 0.0952 0 0.0969
  i-per    1.03 2.40 4.64 99.55 2.52 0.0954 0.0004 0.0967
  i-per+at 0.48 1.29 4.61 99.94 1.47 0.0954 0.0001 0.0971
3.6 cifar10 cnn relu Linf 2/255
  plain    24.62 86.29 100 100 100 0 0 0
  at       27.04 48.53 85.36 100 88.50 0.0011 0 0.0015
  kw       39.27 46.60 53.81 99.98 48.00 0.0036 0 0.0040
  ibp      46.74 56.38 61.81 67.58 58.80 0.0030 0.0025 0.0034
  c-ibp    58.32 63.56 66.28 69.10 65.44 0.0026 0.0024 0.0029
  mmr      34.59 57.17 69.28 100 61.00 0.0024 0 0.0032
  mmr+at   35.36 49.27 59.91 100 54.20 0.0031 0 0.0037
  l-per    39.21 50.98 57.45 99.98 52.70 0.0033 0 0.0038
  l-per+at 28.87 43.55 56.59 100 48.43 0.0034 0 0.0040
  i-per    29.34 51.54 64.34 99.98 54.87 0.0028 0 0.0036
  i-per+at 26.66 43.35 57.72 100 47.87 0.0033 0 0.0040
3.7 mnist fc1 relu L2 0.3
  plain    1.99 9.81 40.97 99.30 0.1771 0.0021 0.2300
  at       1.35 2.99 14.85 99.23 0.2555 0.0023 0.2684
  kw       1.23 2.70 4.91 41.55 0.2853 0.1754 0.2892
  ibp      1.36 2.90 6.87 9.01 0.2794 0.2730 0.2876
  c-ibp    1.26 2.80 6.36 8.73 0.2809 0.2738 0.2884
  mmr      2.40 5.88 7.76 99.55 0.2767 0.0013 0.2845
  mmr+at   1.77 3.76 5.68 99.86 0.2830 0.0004 0.2880
  l-per    1.26 2.44 5.35 59.17 0.2840 0.1225 0.2888
  l-per+at 0.67 1.40 4.84 64.79 0.2855 0.1056 0.2910
  i-per    1.21 2.59 5.34 54.13 0.2840 0.1376 0.2888
  i-per+at 0.74 1.46 7.81 72.85 0.2766 0.0814 0.2860
3.7 mnist cnn relu L2 0.3
  plain    1.28 4.93 100 100 0 0 0
  at       1.12 2.50 100 100 0 0 0
  kw       1.11 2.05 5.84 100 0.2825 0 0.2861
  ibp      2.37 3.85 51.12 11.73 0.1534 0.2648 0.1669
  c-ibp    2.89 4.44 31.62 12.29 0.2051 0.2631 0.2178
  mmr      2.57 5.49 10.03 100 0.2699 0 0.2788
  mmr+at   1.73 3.22 9.46 100 0.2716 0 0.2780
  l-per    1.02 1.87 5.04 100 0.2849 0 0.2882
  l-per+at 0.43 0.91 5.43 100 0.2837 0 0.2878
  i-per    1.11 2.16 6.37 100 0.2809 0 0.2851
  i-per+at 0.52 1.12 7.89 100 0.2763 0 0.2812
3.7 cifar10 cnn relu L2 0.1
  plain    23.29 47.39 100 100 0 0 0
  at       25.84 35.81 99.96 100 0 0 0
  kw       40.24 43.87 48.98 100 0.0510 0 0.0533
  ibp      57.90 60.03 64.78 78.13 0.0352 0.0219 0.0366
  c-ibp    71.21 72.51 76.23 80.97 0.0238 0.0190 0.0256
  mmr      40.93 50.57 57.07 100 0.0429 0 0.0480
  mmr+at   37.78 43.98 53.33 100 0.0467 0 0.0502
  l-per    34.10 52.54 63.42 100 0.0369 0 0.0465
  l-per+at 25.76 33.47 46.74 100 0.0533 0 0.0580
  i-per    33.94 43.06 56.80 100 0.0432 0 0.0484
  i-per+at 24.85 31.32 47.28 100 0.0528 0 0.0572
3.8 mnist fc1 sigmoid Linf 0.1
  plain    2.04 97.80 100 100 0 0 0
  at       1.78 10.05 98.52 100 0.0015 0 0.0055
  ibp      2.06 10.58 44.14 13.65 0.0559 0.0863 0.0846
  c-ibp    2.88 9.83 26.04 12.51 0.0740 0.0875 0.0886
  l-per    1.97 7.55 12.15 84.76 0.0879 0.0152 0.0930
  l-per+at 2.16 7.12 11.87 88.06 0.0881 0.0119 0.0927
  i-per    2.15 8.35 12.79 86.99 0.0872 0.0130 0.0926
  i-per+at 2.45 8.05 12.36 88.94 0.0876 0.0111 0.0923
3.8 mnist fc1 tanh Linf 0.1
  plain    2.00 97.80 100 100 0 0 0
  at       1.28 8.89 99.98 100 0 0 0.0001
  ibp      2.04 9.84 31.81 13.02 0.0682 0.0870 0.0864
  c-ibp    2.75 9.57 20.10 11.80 0.0799 0.0882 0.0894
  l-per    2.19 7.71 11.55 57.81 0.0885 0.0422 0.0934
  l-per+at 2.30 7.45 11.39 56.74 0.0886 0.0433 0.0930
  i-per    2.21 8.51 12.23 55.53 0.0878 0.0445 0.0929
  i-per+at 2.46 7.87 12.04 66.04 0.0880 0.0340 0.0929
3.8 mnist fc1 sigmoid L2 0.3
  plain    2.01 10.25 30.78 94.82 0.2077 0.0155 0.2539
  at       1.65 3.48 7.50 85.84 0.2775 0.0422 0.2839
  ibp      1.40 3.07 6.43 9.13 0.2807 0.2726 0.2873
  c-ibp    1.51 3.24 6.36 8.73 0.2709 0.2738 0.2872
  l-per    1.36 2.58 6.12 73.71 0.2816 0.0789 0.2867
  l-per+at 0.46 1.03 5.26 68.94 0.2842 0.0932 0.2905
  i-per    1.19 2.59 6.05 70.18 0.2818 0.0895 0.2871
  i-per+at 0.49 1.16 5.03 65.79 0.2849 0.1026 0.2907
3.8 mnist fc1 tanh L2 0.3
  plain    1.94 16.46 61.66 99.64 0.1150 0.0011 0.1789
  at       1.36 3.02 12.35 97.66 0.2630 0.0070 0.2735
  ibp      1.57 3.17 7.21 10.44 0.2784 0.2688 0.2851
  c-ibp    1.50 3.14 6.64 9.53 0.2801 0.2714 0.2861
  l-per    1.31 2.47 5.53 55.17 0.2834 0.1345 0.2880
  l-per+at 0.58 1.30 5.89 54.88 0.2823 0.1354 0.2885
  i-per    1.38 2.85 5.90 45.31 0.2823 0.1641 0.2874
  i-per+at 0.55 1.17 5.57 53.73 0.2833 0.1388 0.2890
"""

# table 3.9, T_PEC
_SEARCHES = """
mnist fc1 Linf 12
  plain 9.85, at 10.77, kw 8.48, mmr 8.04, mmr+at 7.68, l-per 9.34, l-per+at 9.38
mnist cnn Linf 12
  plain 10.56, at 11.39, kw 11.61, mmr 10.68, mmr+at 11.22, l-per 11.17, l-per+at 11.74
cifar10 cnn Linf 10
  plain 9.33, at 9.12, kw 8.43, mmr 8.05, mmr+at 8.45, l-per 8.61, l-per+at 8.68
mnist fc1 L2 14
  plain 9.68, at 10.44, kw 7.72, mmr 5.86, mmr+at 5.91, l-per 11.47, l-per+at 11.34
mnist cnn L2 14
  plain 13.64, at 13.76, kw 12.63, mmr 8.52, mmr+at 12.13, l-per 13.75, l-per+at 13.72
cifar10 cnn L2 12
  plain 11.73, at 11.67, kw 10.23, mmr 9.05, mmr+at 10.33, l-per 9.13, l-per+at 10.71
"""
HIGH = {("mnist", "Linf"): 0.4, ("cifar10", "Linf"): 0.1, ("mnist", "L2"): 1.2, ("cifar10", "L2"): 0.4}  # of the search


def _rows() -> list[Printed]:
    found: list[Printed] = []
    about: list[str] = []
    for line in _TABLES.strip().splitlines():
        words = line.split()
        if not line.startswith(" "):
            about = words
            continue
        figures = [float(v) for v in words[1:]]
        if about[0] != "3.6":
            figures.insert(4, math.nan)
        table, data, network, activation, norm, eps = about
        size = 2 / 255 if eps == "2/255" else float(eps)
        found.append(Printed(table, data, network, activation, norm, size, words[0], tuple(figures)))
    return found


def _searches() -> dict[tuple[str, str, str, str], tuple[int, float]]:
    """(data, network, norm, method): T_Lin and T_PEC."""
    found = {}
    lines = _SEARCHES.strip().splitlines()
    for head, row in zip(lines[::2], lines[1::2], strict=True):
        data, network, norm, steps = head.split()
        for cell in row.split(","):
            method, value = cell.split()
            found[data, network, norm, method] = int(steps), float(value)
    return found


PRINTED = _rows()
SEARCHES = _searches()


def printed(network: str, norm: str, method: str) -> tuple[float, ...]:
    """The figures of a ReLU network of MNIST; NaN where the thesis has no such row."""
    method = "c-ibp" if method == "crown-ibp" else method
    for row in PRINTED:
        if (row.data, row.network, row.activation, row.norm, row.method) == ("mnist", network, "relu", norm, method):
            return row.figures
    return (math.nan,) * len(COLUMNS)


def line(label: str, values: Sequence[float], end: str = "", width: int = 30) -> str:
    """A row of ``COLUMNS``; errors in percent, bounds with four digits, nothing where there is no figure."""
    cells = (f"{v:9.{4 if name.startswith('ACB') else 2}f}" for name, v in zip(COLUMNS, values, strict=True))
    return f"{label:<{width}}" + "".join(" " * 9 if "nan" in cell else cell for cell in cells) + end


def beside(label: str, ours: Sequence[float], figures: Sequence[float], end: str = "", width: int = 30) -> str:
    """Three lines: ours, the printed figures, and ours less those."""
    less = [a - b for a, b in zip(ours, figures, strict=True)]
    lines = line(label, ours, end, width), line("  printed", figures, "", width), line("  difference", less, "", width)
    return "\n".join(lines[: 1 if all(math.isnan(v) for v in figures) else 3])
