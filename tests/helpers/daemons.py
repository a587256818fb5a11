"""Single workers in processes of their own, with the limits of tests."""

from __future__ import annotations

from functools import partial

from simnet.checks import daemons

LIMITS = ("--memory", "200MiB", "--kv-memory", "50MiB", "--threads", "1", "--metrics", "127.0.0.1:0")
LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")
HEARD = (*LISTEN, *LIMITS)
HIDDEN = ("--listen", "none", *LIMITS)

daemon = partial(daemons.daemon, limits=HEARD)
