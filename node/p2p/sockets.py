"""What more than one part of the mesh does with a socket."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no seconds


def reset_on_close(sock: socket.socket) -> None:
    """Closing `sock` will drop what is queued and reset, and leave nothing in the kernel to wait for the peer."""
    with suppress(OSError):  # some systems refuse it once the peer has reset
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
