"""Visits at a doorway that say when they are sent away."""

from __future__ import annotations


def comer(door, address, gone):
    visit = door.enter(address)
    visit.evict = lambda: gone.append(visit)
    return visit
