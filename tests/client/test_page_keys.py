"""Keys of pages: golden vectors, and what they must tell apart."""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from pathlib import Path

import pytest

from client.page_keys import PageKeys, page_context, plain_secret
from client.routing import Hop, Route
from equivariant.keys import RootKey
from equivariant.stream import KeyStream
from protocol import limits
from protocol.ids import DeploymentId
from protocol.signed import Identity

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "page_keys.json").read_text())
KEYS = PageKeys(bytes(range(32)), b"context")
IDS = list(range(1000, 1000 + 3 * limits.PAGE_TOKENS))
SIZE = limits.PAGE_KEY_BYTES


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_golden_vectors(vector: dict) -> None:  # type: ignore[type-arg]
    keys = PageKeys(bytes.fromhex(vector["secret"]), bytes.fromhex(vector["context"]))
    assert keys.of(vector["ids"]).hex() == vector["keys"]


def test_the_secret_of_a_sealed_deployment_is_its_streams() -> None:
    stream = KeyStream(RootKey.from_bytes(bytes(range(32))), bytes(16)).derive(None, "pages")
    assert stream.read(32).hex() == VECTORS[0]["secret"]


def test_the_chain_is_what_the_module_says() -> None:
    def digest(data: bytes) -> bytes:
        return blake2b(data, digest_size=SIZE, key=KEYS.secret, person=b"sotto/pages/v1").digest()

    first = digest(digest(b"context") + struct.pack("<64I", *IDS[:64]))
    second = digest(first + struct.pack("<64I", *IDS[64:128]))
    assert KEYS.of(IDS[:190]) == first + second, "full pages only"


def test_a_key_stands_for_all_tokens_up_to_its_page() -> None:
    whole = KEYS.of(IDS)
    for page in range(3):
        changed = list(IDS)
        changed[page * limits.PAGE_TOKENS + 7] += 1
        other = KEYS.of(changed)
        same = [whole[at : at + SIZE] == other[at : at + SIZE] for at in range(0, 3 * SIZE, SIZE)]
        assert same == [index < page for index in range(3)]


def test_secret_and_context_matter() -> None:
    others = [PageKeys(bytes(32), b"context"), PageKeys(KEYS.secret, b"another")]
    assert len({KEYS.of(IDS)[:SIZE], *(other.of(IDS)[:SIZE] for other in others)}) == 3
    ann, ben, cam = (Identity(name * 32) for name in (b"a", b"b", b"c"))
    assert plain_secret(ann) != plain_secret(ben)

    def context(second: Identity, end: int = 4, wire: str = "float32", exact: bool = False) -> bytes:
        hops = (Hop(ann.peer, ("/ip4/192.0.2.1/tcp/1",), 0, 2), Hop(second.peer, (), 2, end))
        return page_context(Route(DeploymentId(bytes(16)), hops), wire, exact)

    contexts = [context(ben), context(cam), context(ben, 5), context(ben, 4, "bfloat16"), context(ben, exact=True)]
    assert len(set(contexts)) == 5


def test_no_more_keys_than_a_message_holds() -> None:
    ids = [1] * (limits.PAGE_TOKENS * (limits.PAGE_KEYS_MAX + 2))
    assert len(KEYS.of(ids)) == limits.PAGE_KEYS_MAX * SIZE
