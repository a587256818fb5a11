"""Homes behind real NAT, on one machine: network namespaces, and the kernel's own address translation.

    internet 11.0.0.0/24: the bridge `core` (11.0.0.1), and per home a router (11.0.0.2, .3, ...)
    each home 192.168.1.0/24: its router (.1) and one host (.5): the same private addresses everywhere, as in life

Needs root and `ip`. The rules are set over netlink, since neither nft nor iptables need be there.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

HOST_IP, CORE_IP = "192.168.1.5", "11.0.0.1"


def permitted() -> bool:
    """May this process build namespaces with NAT in them?"""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    probe = [sys.executable, "-m", "tests.helpers.home_networks", "masquerade"]
    return subprocess.run(["unshare", "-n", *probe], capture_output=True).returncode == 0


def inside(namespace: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


@contextmanager
def homes(count: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """Namespaces: (core, the homes' routers, the homes' hosts)."""
    prefix = f"sotto{os.getpid()}"
    core = f"{prefix}c"
    with ExitStack() as stack:
        stack.enter_context(_namespace(core))
        _ip("-n", core, "link", "add", "lan", "type", "bridge")
        _ip("-n", core, "addr", "add", f"{CORE_IP}/24", "dev", "lan")
        _ip("-n", core, "link", "set", "lan", "up")
        routers, hosts = [], []
        for index in range(count):
            router, host = f"{prefix}r{index}", f"{prefix}h{index}"
            stack.enter_context(_namespace(router))
            stack.enter_context(_namespace(host))
            _home(core, router, host, index)
            routers.append(router)
            hosts.append(host)
        yield core, routers, hosts


def router_ip(index: int) -> str:
    return f"11.0.0.{index + 2}"


def forward(router: str, port: int) -> None:
    """What a person does in the router's settings: `port` from outside goes to the host."""
    _rule(router, "forward", str(port))


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)


def _home(core: str, router: str, host: str, index: int) -> None:
    _ip("link", "add", f"wan{index}", "netns", core, "type", "veth", "peer", "name", "wan", "netns", router)
    _ip("-n", core, "link", "set", f"wan{index}", "master", "lan", "up")
    _ip("link", "add", "lan", "netns", router, "type", "veth", "peer", "name", "eth0", "netns", host)
    for namespace, device, addr in (
        (router, "wan", f"{router_ip(index)}/24"),
        (router, "lan", "192.168.1.1/24"),
        (host, "eth0", f"{HOST_IP}/24"),
    ):
        _ip("-n", namespace, "addr", "add", addr, "dev", device)
        _ip("-n", namespace, "link", "set", device, "up")
    _ip("-n", host, "route", "add", "default", "via", "192.168.1.1")
    subprocess.run(inside(router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"), check=True)
    _rule(router, "masquerade")
    _rule(router, "drop")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _rule(namespace: str, *words: str) -> None:
    command = [sys.executable, "-m", "tests.helpers.home_networks", *words]
    subprocess.run(inside(namespace, *command), check=True, capture_output=True)


# --- nf_tables over netlink: linux/netfilter/nf_tables.h names the numbers

_SUBSYSTEM = 10 << 8
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = (_SUBSYSTEM | kind for kind in (0, 3, 6))
_REQUEST, _ACK, _CREATE_APPEND = 1, 4, 0xC00
_PREROUTING, _INPUT, _POSTROUTING = (0, -100), (1, 0), (4, 100)  # (hook, priority)
_REG_ADDR = 2


def _attr(kind: int, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attr(kind | 0x8000, *parts)


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _number(number: int) -> bytes:
    return struct.pack("!i", number)


def _message(kind: int, flags: int, body: bytes = b"", resource: int = 0) -> bytes:
    payload = struct.pack("!BBH", socket.AF_INET, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0) + payload


def _expression(name: str, *data: bytes) -> bytes:
    return _nested(1, _attr(1, _text(name)), _nested(2, *data))


def _compare(value: bytes) -> bytes:
    return _expression("cmp", _attr(1, _number(1)), _attr(2, _number(0)), _nested(3, _attr(1, value)))


def _from_meta(key: int) -> bytes:
    return _expression("meta", _attr(1, _number(1)), _attr(2, _number(key)))


def _load(register: int, value: bytes) -> bytes:
    return _expression("immediate", _attr(1, _number(register)), _nested(2, _attr(1, value)))


def _table_with(name: str, where: tuple[int, int], *rule: bytes, kind: str = "nat") -> bytes:
    hook = _nested(4, _attr(1, _number(where[0])), _attr(2, _number(where[1])))
    flags = _REQUEST | _ACK | _CREATE_APPEND
    return b"".join(
        (
            _message(16, _REQUEST, resource=10),  # batch begin
            _message(_NEW_TABLE, flags, _attr(1, _text(name))),
            _message(_NEW_CHAIN, flags, _attr(1, _text(name)) + _attr(3, _text("c")) + hook + _attr(7, _text(kind))),
            _message(_NEW_RULE, flags, _attr(1, _text(name)) + _attr(2, _text("c")) + _nested(4, *rule)),
            _message(17, _REQUEST, resource=10),  # batch end
        )
    )


def _masquerade() -> bytes:
    """What leaves by `wan` comes from the router's address."""
    return _table_with("out", _POSTROUTING, _from_meta(7), _compare(b"wan".ljust(16, b"\0")), _expression("masq"))


def _drop() -> bytes:
    """What comes in by `wan` for the router itself gets no answer, as at most homes."""
    verdict = _nested(2, _nested(2, _attr(1, _number(0))))
    rule = (_from_meta(6), _compare(b"wan".ljust(16, b"\0")), _expression("immediate", _attr(1, _number(0)), verdict))
    return _table_with("closed", _INPUT, *rule, kind="filter")


def _forward(port: int) -> bytes:
    """TCP to `port` that comes in by `wan` goes to the host."""
    to_host = _expression("nat", _attr(1, _number(1)), _attr(2, _number(2)), _attr(3, _number(_REG_ADDR)))
    header = _expression(
        "payload", _attr(1, _number(1)), _attr(2, _number(2)), _attr(3, _number(2)), _attr(4, _number(2))
    )
    return _table_with(
        f"in{port}",
        _PREROUTING,
        _from_meta(6),
        _compare(b"wan".ljust(16, b"\0")),
        _from_meta(16),
        _compare(bytes([socket.IPPROTO_TCP])),
        header,
        _compare(struct.pack("!H", port)),
        _load(_REG_ADDR, socket.inet_aton(HOST_IP)),
        to_host,
    )


def _apply(batch: bytes, answers: int = 3) -> None:
    """Raises OSError when the kernel declines."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(2)
        netlink.send(batch)
        while answers:
            data = netlink.recv(1 << 16)
            while data:
                size, kind, *_ = struct.unpack("=IHHII", data[:16])
                if kind == 2:
                    (code,) = struct.unpack("=i", data[16:20])
                    if code:
                        raise OSError(-code, f"nf_tables: {errno.errorcode.get(-code, code)}")
                    answers -= 1
                data = data[size + 3 & ~3 :]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["masquerade"]:
            _apply(_masquerade())
        case ["drop"]:
            _apply(_drop())
        case ["forward", port]:
            _apply(_forward(int(port)))
