"""The drawings of docs/kernels.md: `python docs/_mkdocs/diagrams.py` writes docs/diagrams/*.svg."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "diagrams"
INK, PALE, ACCENT, WARM = "#37474f", "#eceff1", "#3949ab", "#ef6c00"


class Drawing:
    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = PALE, ink: str = INK) -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{INK}"/>')
        lines = text.split("\n")
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4 + 14 * (i - (len(lines) - 1) / 2), line, ink=ink)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", ink: str = INK) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{ink}">{escape(text)}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, ink: str = INK) -> None:
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{ink}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )

    def line(self, points: list[tuple[float, float]], ink: str = INK, dashed: bool = False, width: float = 1.5) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="{width}"{dash}/>')

    def dot(self, x: float, y: float, ink: str = ACCENT) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ink}"/>')

    def write(self, name: str, title: str) -> None:
        w, h = self.size
        tip = f'<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker>'
        body = "\n".join(self.parts)
        (FOLDER / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" font-family="sans-serif" '
            f'font-size="12"><title>{escape(title)}</title><defs>{tip}</defs>\n'
            f'<rect width="{w}" height="{h}" fill="white"/>\n{body}\n</svg>\n'
        )


def step() -> None:
    """Memory traffic of a PGD step: eager torch and the fused kernel."""
    d = Drawing(680, 250)
    d.text(10, 22, "eager torch: six kernels, each through memory", "start")
    names = ["sign", "mul", "add", "sub, clamp", "add", "clamp"]
    for i, name in enumerate(names):
        x = 10 + 110 * i
        d.box(x, 36, 90, 34, name)
        d.arrow(x + 30, 108, x + 30, 72)
        d.arrow(x + 60, 72, x + 60, 108, WARM)
    d.box(
        10,
        110,
        640,
        22,
        "memory: the whole batch is read (dark) and a temporary of its size written (orange), six times",
        fill="#cfd8dc",
    )
    d.text(10, 166, "fused: one kernel, a register at a time", "start")
    d.box(230, 176, 200, 34, "step, ball, box", fill=ACCENT, ink="white")
    for x in (260, 300, 340):
        d.arrow(x, 226, x, 212)
    d.arrow(400, 212, 400, 226, WARM)
    d.box(10, 228, 640, 20, "memory: x, x0 and the gradient read once, x' written once", fill="#cfd8dc")
    d.write("step", "A PGD step in eager torch and fused")


def one_formula() -> None:
    """One formula, five compilations."""
    d = Drawing(680, 210)
    d.box(230, 10, 220, 44, "formula: template <class V>\ncsrc/pgd/step.h", fill=ACCENT, ink="white")
    d.box(60, 84, 250, 34, "V = Vec, sixteen lanes: linf_cpu.cpp")
    d.box(390, 84, 230, 34, "V = float, a thread: linf_cuda.cu")
    d.arrow(290, 56, 200, 82)
    d.arrow(390, 56, 490, 82)
    for i, isa in enumerate(["v2 (SSE4)", "v3 (AVX2)", "v4 (AVX-512)", "NEON"]):
        x = 10 + 95 * i
        d.box(x, 150, 88, 30, isa)
        d.arrow(185, 120, x + 44, 148)
    d.box(430, 150, 150, 30, "sm_75 ... sm_120, PTX")
    d.arrow(505, 120, 505, 148)
    d.text(190, 200, "chosen once, by the processor (FASTROBUST_CPU)")
    d.text(505, 200, "chosen by the driver")
    d.write("one_formula", "One formula, compiled for every instruction set and for CUDA")


def bounds() -> None:
    """Intervals forward, rows backward, extremes at the input."""
    d = Drawing(680, 190)
    names = ["input\nball and box", "layer 1\nReLU", "layer 2\nReLU", "margins\nz_y - z_j"]
    for i, name in enumerate(names):
        d.box(20 + 170 * i, 70, 110, 46, name)
    for i in range(3):
        d.arrow(130 + 170 * i, 84, 188 + 170 * i, 84)
        d.arrow(188 + 170 * i, 104, 130 + 170 * i, 104, WARM)
    d.text(340, 40, "1. intervals forward: a centre and a radius a neuron; lines around each unstable ReLU")
    d.text(340, 146, "2. rows back: a few rows of coefficients at a time, down all layers in the cache")
    d.text(340, 168, "3. extremes of each row on the set; no matrix of a layer is ever written out")
    d.write("bounds", "Intervals forward, rows backward")


def masked() -> None:
    """A masked convolution as shifted runs."""
    d = Drawing(680, 200)
    d.text(130, 20, "kept entries of one output channel")
    for r in range(3):
        for c in range(3):
            kept = (r, c) in {(0, 1), (2, 0)}
            d.box(
                85 + 30 * c,
                34 + 30 * r,
                28,
                28,
                "+" if (r, c) == (0, 1) else "-" if kept else "",
                fill=ACCENT if kept else PALE,
                ink="white",
            )
    d.text(130, 150, "two index lists: add, subtract")
    d.text(460, 20, "the output row is a sum of shifted runs of input rows")
    for k, (shift, sign) in enumerate([(0, "+"), (-14, "-")]):
        y = 40 + 44 * k
        d.text(270, y + 18, sign)
        for i in range(12):
            d.box(300 + shift + 28 * i, y, 26, 26, fill="#c5cae9" if 1 <= i <= 10 else PALE)
    d.line([(290, 136), (650, 136)])
    for i in range(12):
        d.box(300 + 28 * i, 144, 26, 26, fill="#9fa8da" if 1 <= i <= 10 else PALE)
    d.text(
        340, 192, "one index load and one vector addition for each kept entry and vector; pruned weights cost nothing"
    )
    d.write("masked", "A masked convolution")


def distance() -> None:
    """Newton's method from the left on a concave function."""
    d = Drawing(520, 270)
    left, base, scale_x, scale_y = 60, 220, 100, 85
    f = lambda t: sum(w * min(t * w, c) for w, c in ((1.0, 0.35), (0.8, 0.9), (0.6, 2.0)))
    slope = lambda t: sum(w * w for w, c in ((1.0, 0.35), (0.8, 0.9), (0.6, 2.0)) if t * w < c)
    at = lambda t, v: (left + scale_x * t, base - scale_y * v)
    d.arrow(left, base, left + 430, base)
    d.arrow(left, base, left, 30)
    d.text(left + 420, base + 18, "t")
    d.text(left - 8, 40, "F", "end")
    target = 1.9
    d.line([at(0, target), at(4.2, target)], WARM, dashed=True)
    d.text(left + 425, at(0, target)[1] - 6, "b", ink=WARM)
    d.line([at(t / 50, f(t / 50)) for t in range(206)], ACCENT, width=2)
    t = 0.0
    while not math.isclose(f(t), target, rel_tol=1e-9):
        following = t + (target - f(t)) / slope(t)
        d.line([at(t, f(t)), at(following, target)], INK, dashed=True)
        d.dot(*at(t, f(t)))
        t = following
    d.dot(*at(t, f(t)), ink=WARM)
    d.text(left + 215, 252, "each tangent lies above F, so no step passes the root:")
    d.text(left + 215, 267, "coordinates that met the box leave the sum, and it ends")
    d.write("distance", "Newton's method from the left on a concave piecewise linear function")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (step, one_formula, bounds, masked, distance):
        draw()
