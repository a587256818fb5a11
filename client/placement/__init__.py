"""Placement: which span goes to whom. Pure: adverts, the model's needs and options in, a placement out.

docs/PLACEMENT.md says how the cost is made, how it is minimised and how good the result is. Not here: choosing between
deployed replicas (client/routing.py), and measuring round-trip times (client/rtts.py).
"""

from client.placement.costs import HOP_SOFTWARE_S, EngineFigures
from client.placement.mending import mended
from client.placement.needs import ModelNeeds, PlaceOptions
from client.placement.plan import Placement, PlannedHop, alone, could_fit, lower_bound_ms, plan, priced

__all__ = [
    "HOP_SOFTWARE_S",
    "EngineFigures",
    "ModelNeeds",
    "PlaceOptions",
    "Placement",
    "PlannedHop",
    "alone",
    "could_fit",
    "lower_bound_ms",
    "mended",
    "plan",
    "priced",
]
