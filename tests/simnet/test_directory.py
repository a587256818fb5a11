"""The directory of the virtual network keeps the port's contract."""

from __future__ import annotations

import pytest
import trio

from protocol.errors import TransportError
from protocol.limits import PROVIDER_LIFE_S
from simnet import runtime
from simnet.directory import VirtualDirectory
from simnet.network import open_network
from tests.conformance.adapters import full_addr, seed_of


def test_what_one_provides_others_find_until_it_expires():
    async def main():
        async with open_network(1) as network, network.join(seed_of("a")) as a, network.join(seed_of("b")) as b:
            directory = VirtualDirectory()
            near, far = directory.of(a), directory.of(b)
            with pytest.raises(TransportError):
                await near.provide(b"k" * 32)
            await a.connect(full_addr(b))
            await near.provide(b"k" * 32)
            assert [(found.peer, found.addrs) for found in await far.providers(b"k" * 32)] == [(a.peer, a.addrs)]
            assert await near.providers(b"k" * 32) == ()
            assert await far.providers(b"x" * 32) == ()
            await trio.sleep(PROVIDER_LIFE_S)
            assert await far.providers(b"k" * 32) == ()

    runtime.run(main, seed=1)
