"""sotto: run language models on machines that you do not trust.

    from sotto import Swarm
    with Swarm("/ip4/203.0.113.7/tcp/4517/p2p/12D3Koo...") as swarm:
        model = swarm.deploy("path/or/hub-id")
        print(model.generate("The Python language").text)

`AsyncSwarm` is the same on trio. Names load on first use: `import sotto` alone loads neither torch nor key code, which
a worker process must never hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sotto.api import AsyncModel, AsyncSwarm, Model, SamplingParams, Swarm

__all__ = ["AsyncModel", "AsyncSwarm", "Model", "SamplingParams", "Swarm"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sotto' has no attribute {name!r}")
    from sotto import api

    return getattr(api, name)
