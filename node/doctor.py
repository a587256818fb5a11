"""What the doctor concludes: gathered facts to findings, each with what to do. Pure.

Every finding is one line that its reader can act on: `fail` stops a worker from being of use, `warn` makes it slower or
harder to find, `ok` is fine. How facts are gathered is app_doctor.py's business. Whatever peers and routers wrote, a
finding is fit for a terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from client.errors import printable
from node.files import show_bytes
from protocol.limits import CLOCK_SKEW_MAX_S

SKEW_WARN_S = 2.0  # machines on NTP are within 1 s
DISK_FREE_BYTES_MIN = 1 << 30  # a block of a model of 7 B parameters takes about half of it


class Level(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy` is "" when there is nothing to do."""

    check: str
    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out. None, or (), where nobody could say."""

    port: int | None  # that a worker listens on; None when it opens none
    port_error: str  # why it cannot be opened, "" when it can
    running: str  # the reachability that a worker running here states, "" when none runs
    local_ip: str | None  # this machine's address towards others
    bootstrap: tuple[tuple[str, str], ...]  # (address, why it does not answer or "")
    swarm: str  # the private swarm's name, "" for the public one
    greeted: tuple[bool, ...]  # per peer that was connected: does it talk to this machine?
    neighbour: bool  # a peer of the local network answered; looked for only when no address was named
    verdicts: tuple[str | None, ...]  # per peer that dialled back: where it succeeded, or None
    seen_at: str | None  # the address from which peers see this machine come
    gateway: str | None  # the external address of a router that speaks UPnP
    relays: int  # connected peers that would relay
    multicast: bool
    skews_s: tuple[float, ...]  # this clock minus each worker's, seconds
    memory_given_bytes: int
    memory_free_bytes: int
    folder: str
    folder_error: str
    disk_free_bytes: int
    version: str
    versions: tuple[str, ...]  # that other workers state
    software: str  # versions of what this runs on
    kernels: bool  # the compiled ones load, or this machine could not run them


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """All findings, in the order in which a reader should mend them."""
    checks = (
        _folder, _memory, _port, _bootstrap, _member, _reachable, _gateway, _relay, _clock, _multicast, _version,
        _kernels,
    )  # fmt: skip
    findings = (finding for check in checks for finding in check(facts))
    return tuple(replace(each, text=printable(each.text), remedy=printable(each.remedy)) for each in findings)


def _folder(facts: Facts) -> Iterator[Finding]:
    if facts.folder_error:
        yield Finding(
            "data folder",
            Level.FAIL,
            f"{facts.folder} cannot be written ({facts.folder_error})",
            "give a folder of your own with --data-dir, or mend its permissions",
        )
    elif facts.disk_free_bytes < DISK_FREE_BYTES_MIN:
        yield Finding(
            "data folder",
            Level.WARN,
            f"{facts.folder} has {show_bytes(facts.disk_free_bytes)} free",
            "make room: sealed blocks are kept there",
        )
    else:
        yield Finding("data folder", Level.OK, f"{facts.folder}, {show_bytes(facts.disk_free_bytes)} free")


def _memory(facts: Facts) -> Iterator[Finding]:
    text = f"{show_bytes(facts.memory_given_bytes)} given, {show_bytes(facts.memory_free_bytes)} free"
    if facts.memory_given_bytes > facts.memory_free_bytes and not facts.running:
        yield Finding("memory", Level.WARN, text, "give less with --memory, or close something: the machine would swap")
    else:
        yield Finding("memory", Level.OK, text)


def _port(facts: Facts) -> Iterator[Finding]:
    if facts.running:
        yield Finding("port", Level.OK, f"a worker runs here, on port {facts.port}" if facts.port else "a worker runs")
    elif facts.port_error:
        yield Finding("port", Level.FAIL, facts.port_error, "choose another with --listen")
    elif facts.port is None:
        yield Finding("port", Level.OK, "none is opened (--listen none)")
    else:
        yield Finding("port", Level.OK, f"TCP port {facts.port} can be opened")


def _bootstrap(facts: Facts) -> Iterator[Finding]:
    silent = [(addr, why) for addr, why in facts.bootstrap if why]
    if not facts.bootstrap and facts.neighbour:
        yield Finding("swarm", Level.OK, "found one on the local network")
    elif not facts.bootstrap:
        yield Finding(
            "swarm",
            Level.WARN,
            "no node of a swarm was named, and none is on the local network: nobody was asked",
            "give --bootstrap ADDRESS or INVITE",
        )
    elif len(silent) == len(facts.bootstrap):
        yield Finding(
            "swarm",
            Level.FAIL,
            f"no bootstrap address answers ({silent[0][1]})",
            "check the address (nodes move: a newer invite has newer ones), that its node is up, and that outgoing TCP "
            "connections are allowed here",
        )
    elif silent:
        yield Finding(
            "swarm",
            Level.WARN,
            f"{len(silent)} of {len(facts.bootstrap)} bootstrap addresses do not answer: {silent[0][0]}",
            "leave it out",
        )
    else:
        yield Finding("swarm", Level.OK, f"bootstrap addresses that answer: {len(facts.bootstrap)}, all")


def _member(facts: Facts) -> Iterator[Finding]:
    silent = len(facts.greeted) - sum(facts.greeted)
    level = Level.FAIL if silent == len(facts.greeted) else Level.WARN
    of = f"{silent} of {len(facts.greeted)} peers"
    if silent and facts.swarm:
        text = f"{of} do not take the key of the private swarm {facts.swarm}"
        yield Finding("member", level, text, "ask a member for a new invite: theirs may be another swarm")
    elif silent:
        remedy = "ask one of its members for an invite ('sotto invite' prints it), and give it with --bootstrap"
        yield Finding("member", level, f"{of} do not talk to this machine: most likely their swarm is private", remedy)
    elif facts.swarm and facts.greeted:
        yield Finding("member", Level.OK, f"of the private swarm {facts.swarm}")


def _reachable(facts: Facts) -> Iterator[Finding]:
    if facts.running:
        yield _stated(facts)
        return
    dialled = [addr for addr in facts.verdicts if addr is not None]
    if facts.port is None or facts.port_error:
        yield Finding(
            "reachable",
            Level.WARN if facts.relays else Level.FAIL,
            "no port is open, so others reach this machine through a relay only" if facts.relays else
            "no port is open, and no relay was found: nobody can reach this machine",
            "open a port (--listen) if you can: a relay makes every hop slower",
        )  # fmt: skip
    elif not facts.verdicts:
        yield Finding("reachable", Level.WARN, "nobody tried to dial this machine, so it is not known")
    elif len(dialled) * 2 > len(facts.verdicts):
        best = Counter(dialled).most_common(1)[0][0]  # a liar may be the first to answer
        yield Finding("reachable", Level.OK, f"{len(dialled)} of {len(facts.verdicts)} peers reach {best}")
    else:
        yield Finding(
            "reachable",
            Level.WARN if facts.relays or facts.gateway else Level.FAIL,
            f"{len(facts.verdicts) - len(dialled)} of {len(facts.verdicts)} peers cannot dial this machine",
            _open_the_port(facts),
        )


def _stated(facts: Facts) -> Finding:
    match facts.running:
        case "public" | "mapped":
            return Finding("reachable", Level.OK, f"the worker that runs here was dialled by others ({facts.running})")
        case "relayed":
            text = "the worker that runs here is reached through a relay only"
            return Finding("reachable", Level.WARN, text, _open_the_port(facts))
        case "unreachable":
            text = "nobody can reach the worker that runs here, and no relay takes it"
            return Finding("reachable", Level.FAIL, text, _open_the_port(facts))
        case _:
            return Finding("reachable", Level.WARN, "the worker that runs here has heard no verdict yet")


def _open_the_port(facts: Facts) -> str:
    """What to do for a machine that others cannot dial."""
    if facts.port is None:
        return "open a port with --listen"
    if facts.seen_at is not None and facts.seen_at == facts.local_ip:
        return f"allow incoming TCP connections to port {facts.port} in this machine's firewall"
    where = f" ({facts.seen_at} from outside)" if facts.seen_at else ""
    target = facts.local_ip or "this machine"
    return (
        f"forward TCP port {facts.port} of your router{where} to {target} port {facts.port}, and allow it in this "
        "machine's firewall; until then a relay serves if one is found"
    )


def _gateway(facts: Facts) -> Iterator[Finding]:
    hidden = facts.running in ("relayed", "unreachable") or (facts.verdicts and not any(facts.verdicts))
    if facts.gateway is not None:
        yield Finding("router", Level.OK, f"speaks UPnP, seen as {facts.gateway}: a worker asks it for a port")
    elif hidden:
        yield Finding(
            "router", Level.WARN, "none here speaks UPnP", "switch UPnP on in the router, or forward the port by hand"
        )
    else:
        yield Finding("router", Level.OK, "none here speaks UPnP; it is needed only when nobody can dial you")


def _relay(facts: Facts) -> Iterator[Finding]:
    if facts.relays:
        yield Finding("relay", Level.OK, f"peers that would relay for this machine: {facts.relays}")
    elif facts.neighbour or any(not why for _, why in facts.bootstrap):
        yield Finding("relay", Level.WARN, "no peer that was asked relays", "only needed while nobody can dial you")


def _clock(facts: Facts) -> Iterator[Finding]:
    if not facts.skews_s:
        return
    ordered = sorted(facts.skews_s)
    skew_s = ordered[len(ordered) // 2]
    text = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the median of {len(ordered)} workers"
    if abs(skew_s) > CLOCK_SKEW_MAX_S:
        yield Finding("clock", Level.FAIL, text, "set this machine's clock (NTP): its adverts are refused")
    elif abs(skew_s) > SKEW_WARN_S:
        yield Finding("clock", Level.WARN, text, "set this machine's clock (NTP)")
    else:
        yield Finding("clock", Level.OK, text)


def _multicast(facts: Facts) -> Iterator[Finding]:
    if facts.multicast:
        yield Finding("multicast", Level.OK, "works: nodes in this network can find each other")
    else:
        yield Finding(
            "multicast",
            Level.WARN,
            "does not work here (common in containers, clouds and VPNs)",
            "name a node with --bootstrap: neighbours are not found by themselves",
        )


def _version(facts: Facts) -> Iterator[Finding]:
    others = sorted(set(facts.versions) - {facts.version})
    text = f"sotto {facts.version}; {facts.software}"
    if others:
        yield Finding("version", Level.WARN, f"{text}; other workers run {', '.join(others)}", "update the older one")
    else:
        yield Finding("version", Level.OK, text)


def _kernels(facts: Facts) -> Iterator[Finding]:
    if not facts.kernels:
        yield Finding(
            "kernels",
            Level.WARN,
            "the compiled kernels do not load: torch's own operations compute tokens at half of the speed",
            "install a C compiler and Python's headers, and then sotto again on this machine",
        )
