"""How far an address reaches."""

from __future__ import annotations

import pytest

from protocol.scopes import dialable_beside, scope_of, trusted_scopes


@pytest.mark.parametrize(
    ("addr", "scope"),
    [
        ("/ip4/127.0.0.1/tcp/22", "loopback"),
        ("/ip4/169.254.169.254/tcp/80", "link-local"),
        ("/ip4/10.1.2.3/tcp/4001", "private"),
        ("/ip4/8.8.8.8/tcp/4001", "global"),
        ("/ip6/::1/tcp/1", "loopback"),
        ("/ip6/fe80::1/tcp/1", "link-local"),
        ("/ip6/fd00::1/tcp/1", "private"),
        ("/ip6/2606:4700::1111/tcp/1", "global"),
        ("/ip6/fec0::1/tcp/1", "private"),
        ("/ip6/::ffff:127.0.0.1/tcp/1", "loopback"),
        ("/ip6/::ffff:100.64.0.1/tcp/1", "private"),
        ("/ip6/64:ff9b::8.8.8.8/tcp/1", "global"),
        ("/ip6/64:ff9b::169.254.169.254/tcp/1", "link-local"),
        ("/ip6/64:ff9b:1::10.1.2.3/tcp/1", "private"),
        ("/ip6/2002:0a01:0203::1/tcp/1", "private"),
        ("/ip4/100.64.0.1/tcp/1", "private"),
        ("/ip4/100.100.100.200/tcp/80", "private"),
        ("/ip4/192.0.2.1/tcp/1", "private"),
        ("/ip4/0.0.0.0/tcp/1", ""),
        ("/ip4/224.0.0.1/tcp/1", ""),
        ("/dns4/localhost/tcp/1", ""),
        ("/ip4/nonsense/tcp/1", ""),
        ("rubbish", ""),
        ("", ""),
    ],
)
def test_scopes(addr: str, scope: str) -> None:
    assert scope_of(addr) == scope


LOOPBACK, LINK_LOCAL, PRIVATE, PUBLIC = (
    "/ip4/127.0.0.1/tcp/6379",
    "/ip4/169.254.169.254/tcp/80",
    "/ip4/192.168.1.1/tcp/80",
    "/ip4/8.8.8.8/tcp/4001",
)
STATED = (LOOPBACK, LINK_LOCAL, PRIVATE, "/dns4/looked.up.example/tcp/1", PUBLIC)


@pytest.mark.parametrize(
    ("neighbours", "dialled"),
    [
        ((), (PUBLIC,)),
        (("/ip4/9.9.9.9",), (PUBLIC,)),
        (("/ip4/10.0.0.7",), (PRIVATE, PUBLIC)),
        (("/ip4/10.0.0.7", "/ip4/9.9.9.9"), (PRIVATE, PUBLIC)),
        (("/ip6/fe80::1",), (LINK_LOCAL, PUBLIC)),
        (("/ip4/127.0.0.1",), (LOOPBACK, LINK_LOCAL, PRIVATE, PUBLIC)),
        (("/ip4/0.0.0.0",), (PUBLIC,)),
    ],
    ids=["nobody", "the internet", "at home", "both", "one cable", "one machine", "nowhere"],
)
def test_who_only_dials_goes_where_it_has_neighbours(neighbours: tuple[str, ...], dialled: tuple[str, ...]) -> None:
    assert dialable_beside(neighbours, STATED) == dialled


@pytest.mark.parametrize(
    ("given", "private", "dialled"),
    [
        ((), False, (PUBLIC,)),
        (("/ip4/9.9.9.9/tcp/1", "/dns4/looked.up.example/tcp/1"), False, (PUBLIC,)),
        (("/ip4/9.9.9.9/tcp/1", "/ip4/10.0.0.7/tcp/1"), False, (PRIVATE, PUBLIC)),
        (("/ip4/127.0.0.1/tcp/1",), False, (PUBLIC,)),
        (("/ip4/9.9.9.9/tcp/1",), True, (LINK_LOCAL, PRIVATE, PUBLIC)),
    ],
    ids=["nothing", "the internet", "at home, too", "one machine", "members"],
)
def test_who_joins_over_the_internet_goes_into_networks_that_were_named(
    given: tuple[str, ...], private: bool, dialled: tuple[str, ...]
) -> None:
    assert dialable_beside(("/ip4/9.9.9.9",), STATED, trusted_scopes(given, private)) == dialled
