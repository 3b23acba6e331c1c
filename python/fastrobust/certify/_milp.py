"""Subproblems by HiGHS (highspy, an optional package): as a linear program where all neurons are fixed, else as a
mixed-integer one."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrobust.certify._subproblems import Lines, Problems

_TOLERANCE = 1e-6  # HiGHS's own on feasibility, relative to the largest bound of a neuron
_SECONDS = 60.0


def available() -> bool:
    """Whether highspy can be imported."""
    return importlib.util.find_spec("highspy") is not None


class Leaves:
    """``leaves(example, entry)``: (a lower bound of what the margin exceeds of what it must, a point near the minimum),
    or None.

    Where all neurons are fixed the duals of the linear program become multipliers, and the bound is computed from them
    in float64 with its rounding: it does not rest on HiGHS's tolerances. With binaries it does: then it must exceed
    1e-6 of the numbers' size.
    """

    def __init__(self, problems: Problems, outward: bool, seconds: float = _SECONDS):
        self.p, self.enough, self.seconds = problems, problems.enough(outward), seconds

    def __call__(self, at: int, entry: Any) -> tuple[float, Tensor | None] | None:
        if self.p.sets[torch.float64].norm != math.inf:
            return None
        crossing = (entry.low < 0) & (entry.up > 0)
        return self._mixed(at, entry, crossing) if bool(crossing.any()) else self._linear(at, entry)

    # -- all signs fixed -----------------------------------------------------------------------------------------------
    def _linear(self, at: int, entry: Any) -> tuple[float, Tensor | None] | None:
        p, t = self.p, entry.target
        m, sets = p.maps[torch.float64], p.sets[torch.float64]
        on = (entry.low >= 0).double()
        through = torch.eye(p.size, dtype=torch.float64, device=on.device) - m.B[at] * on
        Z = torch.linalg.solve(through, torch.cat([m.A[at], m.c[at][:, None]], 1))
        Z, c = Z[:, :-1], Z[:, -1]
        weight = m.b[at, t] * on
        cost, chosen = m.a[at, t] + weight @ Z, entry.split != 0
        sign = entry.split.double()
        low, up = sets.low[at].flatten(), sets.up[at].flatten()
        rows, least = (sign[:, None] * Z)[chosen], -(sign * c)[chosen]
        # the least violation first: if there must be one, its multipliers show that the subproblem is empty
        solved = _minimum(torch.zeros_like(cost), low, up, rows, least, slack=True)
        if solved is None:
            return None
        violation, point, dual = solved
        if violation <= 1e-9:
            solved = _minimum(cost, low, up, rows, least, slack=False)
            if solved is None:
                return None
            _, point, dual = solved
        else:
            room = float((cost.abs() * torch.maximum(low.abs(), up.abs())).sum() + m.d[at, t].abs() + 1)
            dual = dual * (2 * room / violation)
        push = torch.zeros_like(sign)
        push[chosen] = dual.clamp(min=0)
        return self._value(at, entry, push), point

    def _value(self, at: int, entry: Any, push: Tensor) -> float:
        p, which = self.p, torch.tensor([at], device=entry.low.device)
        wide = lambda v: v.view(1, 1, -1)  # noqa: E731
        lines = Lines.of(wide(entry.low), wide(entry.up))
        target = torch.tensor([[entry.target]], device=which.device)
        signed = wide(push * entry.split)
        value = p.of(which, torch.float64).lower(target, lines, torch.zeros_like(signed), signed).value
        return float(value[0, 0] - (push * p.error[at]).sum() - self.enough[at, entry.target])

    # -- some are open -------------------------------------------------------------------------------------------------
    def _mixed(self, at: int, entry: Any, crossing: Tensor) -> tuple[float, Tensor | None] | None:
        p, t = self.p, entry.target
        m, sets = p.maps[torch.float64], p.sets[torch.float64]
        d, u = m.A.shape[2], p.size
        low, up = entry.low.cpu().numpy(), entry.up.cpu().numpy()
        free = crossing.nonzero()[:, 0].cpu().numpy()
        n, zeros = len(free), np.zeros
        # columns: x, z, r, and a binary of every open neuron
        lower = np.concatenate([sets.low[at].flatten().cpu().numpy(), low, zeros(u), zeros(n)])
        upper = np.concatenate([sets.up[at].flatten().cpu().numpy(), up, np.maximum(up, 0), np.ones(n)])
        cost = np.concatenate([m.a[at, t].cpu().numpy(), zeros(u), m.b[at, t].cpu().numpy(), zeros(n)])
        eye = np.eye(u)
        layers = np.hstack([-m.A[at].cpu().numpy(), eye, -m.B[at].cpu().numpy(), zeros((u, n))])
        c = m.c[at].cpu().numpy()
        active = (low >= 0).nonzero()[0]
        same = np.hstack([zeros((len(active), d)), -eye[active], eye[active], zeros((len(active), n))])
        pick = np.eye(n)
        z, r = eye[free], eye[free]
        above = np.hstack([zeros((n, d)), -z, r, zeros((n, n))])  # r >= z
        off = np.hstack([zeros((n, d)), zeros((n, u)), r, -pick * up[free, None]])  # r <= u on
        on = np.hstack([zeros((n, d)), -z, r, -pick * low[free, None]])  # r <= z - l (1 - on)
        rows = np.vstack([layers, same, above, off, on])
        least = np.concatenate([c, zeros(len(active)), zeros(n), np.full(2 * n, -np.inf)])
        most = np.concatenate([c, zeros(len(active)), np.full(n, np.inf), zeros(n), -low[free]])
        whole = np.concatenate([zeros(d + 2 * u), np.ones(n)])
        h = _solver(self.seconds)
        _fill(h, (cost, lower, upper), (rows, least, most), whole, float(m.d[at, t]))
        h.run()
        import highspy

        status, info = h.getModelStatus(), h.getInfo()
        size = 1 + float(np.abs(np.concatenate([low, up])).max(initial=0.0)) + abs(float(m.d[at, t]))
        margin = float(self.enough[at, t]) + _TOLERANCE * size
        if status == highspy.HighsModelStatus.kInfeasible:
            return size, None
        point = None
        if info.primal_solution_status == 2:
            point = torch.tensor(np.asarray(h.getSolution().col_value)[:d], device=m.A.device)
        bound = float(info.mip_dual_bound)
        return (bound - margin if math.isfinite(bound) else -math.inf), point


def _solver(seconds: float) -> Any:
    import highspy

    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("log_to_console", False)
    h.setOptionValue("time_limit", seconds)
    h.setOptionValue("mip_rel_gap", 0.0)
    h.setOptionValue("mip_abs_gap", 1e-9)
    h.setOptionValue("primal_feasibility_tolerance", 1e-9)
    h.setOptionValue("mip_feasibility_tolerance", 1e-9)
    return h


def _fill(h: Any, columns: Any, rows: Any, integer: Any, offset: float = 0.0) -> None:
    import highspy

    (cost, lower, upper), (matrix, least, most) = columns, rows
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), len(least)
    lp.col_cost_, lp.col_lower_, lp.col_upper_, lp.offset_ = cost, lower, upper, offset
    lp.row_lower_, lp.row_upper_ = least, most
    if integer is not None:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(v)] for v in integer]
    r, c = matrix.nonzero()
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.bincount(r, minlength=len(least)))]).astype(np.int32)
    lp.a_matrix_.index_, lp.a_matrix_.value_ = c.astype(np.int32), matrix[r, c]
    h.passModel(lp)


def _minimum(
    cost: Tensor, low: Tensor, up: Tensor, rows: Tensor, least: Tensor, slack: bool
) -> tuple[float, Tensor, Tensor] | None:
    """min cost x (or, with ``slack``, the largest violation) over rows x >= least in a box: value, x, multipliers of
    the rows."""
    import highspy

    n = len(cost)
    c, a, b, m = (t.cpu().numpy() for t in (cost, low, up, rows))
    if slack:
        c, a, b = np.append(c, 1.0), np.append(a, 0.0), np.append(b, np.inf)
        m = np.hstack([m, np.ones((len(m), 1))])
    h = _solver(_SECONDS)
    _fill(h, (c, a, b), (m, least.cpu().numpy(), np.full(len(m), np.inf)), None)
    h.run()
    if h.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    found = h.getSolution()
    point = torch.tensor(np.asarray(found.col_value)[:n], device=cost.device)
    dual = torch.tensor(np.asarray(found.row_dual), dtype=torch.float64, device=cost.device)
    return float(h.getInfo().objective_function_value), point, dual
