"""Whether this machine's loopback takes multicast."""

from __future__ import annotations

import socket

import pytest


def _multicast_on_loopback() -> bool:
    """Does a datagram sent to a group on loopback come back?"""
    group, port = "224.0.0.251", 0
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far,
    ):
        try:
            far.bind(("", port))
            lo = socket.inet_aton("127.0.0.1")
            far.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + lo)
            near.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, lo)
            near.sendto(b"?", (group, far.getsockname()[1]))
            far.settimeout(1)
            return far.recv(1) == b"?"
        except OSError:
            return False


needs_multicast = pytest.mark.skipif(not _multicast_on_loopback(), reason="no multicast on loopback here")
