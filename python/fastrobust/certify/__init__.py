"""Certificates: polyhedral envelopes, the largest certified radius, non-uniform regions, and their summaries."""

from fastrobust.certify import plots
from fastrobust.certify.curves import CertifiedCurve, average_certified_bound, certified_curve, certified_robust_error
from fastrobust.certify.envelope import Envelope, polyhedral_envelope
from fastrobust.certify.exact import Verification, verify
from fastrobust.certify.nonuniform import NonuniformRadius, nonuniform_radius
from fastrobust.certify.search import RadiusSearch, search_radius

__all__ = [
    "CertifiedCurve",
    "Envelope",
    "NonuniformRadius",
    "RadiusSearch",
    "Verification",
    "average_certified_bound",
    "certified_curve",
    "certified_robust_error",
    "nonuniform_radius",
    "plots",
    "polyhedral_envelope",
    "search_radius",
    "verify",
]
