"""What one gossipsub RPC may ask of this node. Pure.

An RPC of 1 MiB has room for 500,000 entries, and py-libp2p does each of them at once: a task for a message, a signed
answer for a GRAFT, an entry that is never deleted for a PRUNE. `trim` leaves of an RPC what an honest neighbour means,
and prices it; the caller makes a neighbour wait that spends faster than PRICE_PER_S (gossip.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized
from itertools import islice
from typing import Any

from libp2p.exceptions import ParseError
from libp2p.pubsub.pb import rpc_pb2

PRICE_PER_S = 100.0  # one unit costs 0.1 to 0.3 ms; an honest neighbour spends about 10 a second
PRICE_BURST = 1000.0
ENTRIES_MAX = 512  # of one RPC; a neighbour that catches up sends its last adverts in one
TOPIC_CHARS_MAX = 128
IDS_MAX = 200  # message ids of one IHAVE or IWANT: ten seconds of all that a neighbour may forward
IDS_PER_UNIT = 20
AUTHOR_PREFIX = bytes.fromhex("002408011220")  # an Ed25519 key as a peer id (protocol/ids.py)
AUTHOR_BYTES = len(AUTHOR_PREFIX) + 32
KEY_AT = 2  # what follows in a peer id is the key itself, as a message may repeat it
SEQNO_BYTES_MAX = 8
ENVELOPE_BYTES_MAX = 512  # of a message beside its data: author, number, topic, signature and key take some 290
ID_BYTES_MAX = 100  # author and number have 46, twice as many in hexadecimal


def trim(rpc: rpc_pb2.RPC, topics: Collection[str]) -> float:
    """Remove what we have no use for, in place; gives the price of what is left.

    `topics` are those that we subscribe to: others have no mesh here. Raises ParseError for more entries than any
    neighbour needs.
    """
    control = rpc.control
    entries: tuple[Sized, ...] = (
        rpc.publish, rpc.subscriptions, control.ihave, control.iwant, control.graft, control.prune
    )  # fmt: skip
    if sum(map(len, entries)) + len(control.idontwant) > ENTRIES_MAX:
        raise ParseError(f"an RPC of more than {ENTRIES_MAX} entries")
    # A signed address record: verified each time, and read by nobody here.
    rpc.ClearField("senderRecord")
    _keep(rpc.subscriptions, [each for each in rpc.subscriptions if _is_name(each.topicid)])
    _keep(rpc.publish, [each for each in rpc.publish if _is_ours(each, topics)])
    ids = _trim_control(control, topics) if rpc.HasField("control") else 0
    return 1 + sum(map(len, entries)) + ids / IDS_PER_UNIT


def _is_name(topic: object) -> bool:
    """What is not UTF-8 comes as bytes."""
    return isinstance(topic, str) and len(topic) <= TOPIC_CHARS_MAX


def _is_ours(message: rpc_pb2.Message, topics: Collection[str]) -> bool:
    """One of our topics, by an author whose key is in its id: others bring a key along, of a kind that may be slow.
    Nothing but its data is large: all of it is kept for minutes and forwarded, and whoever forwards it can add to what
    is not signed."""
    author = message.from_id
    return (
        len(message.topicIDs) == 1
        and message.topicIDs[0] in topics
        and len(author) == AUTHOR_BYTES
        and author.startswith(AUTHOR_PREFIX)
        and len(message.seqno) <= SEQNO_BYTES_MAX
        and message.key in (b"", author[KEY_AT:])
        and message.ByteSize() - len(message.data) <= ENVELOPE_BYTES_MAX
    )


def _trim_control(control: rpc_pb2.ControlMessage, topics: Collection[str]) -> int:
    """Gives the number of message ids that are left."""
    for name in ("ihave", "graft", "prune"):
        entries = getattr(control, name)
        _keep(entries, {each.topicID: each for each in entries if each.topicID in topics}.values())
    wanted = rpc_pb2.ControlIWant(messageIDs=islice(_ids(control.iwant), IDS_MAX))
    del control.iwant[:]
    control.iwant.extend([wanted] if wanted.messageIDs else [])
    for offer in control.ihave:
        _keep(offer.messageIDs, list(islice(_ids([offer]), IDS_MAX)))
    for prune in control.prune:
        prune.ClearField("peers")  # whom to dial is not a neighbour's to choose
    control.ClearField("idontwant")  # of version 1.2; this is 1.1
    return len(wanted.messageIDs) + sum(len(offer.messageIDs) for offer in control.ihave)


def _ids(entries: Iterable[rpc_pb2.ControlIHave | rpc_pb2.ControlIWant]) -> Iterable[bytes]:
    """The message ids of `entries`, each once. Those that no message of ours can have are left out: they would be
    repeated to who sent them."""
    first = (number for entry in entries for number in islice(entry.messageIDs, IDS_MAX))
    return dict.fromkeys(number for number in first if len(number) <= ID_BYTES_MAX)


def _keep(field: Any, kept: Iterable[Any]) -> None:
    """Make a repeated field hold `kept`, which may be elements of its own."""
    elements = list(kept)
    if len(elements) < len(field):
        del field[:]
        field.extend(elements)
