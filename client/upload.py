"""Uploading: the shards that a worker lacks, from where an earlier upload broke off.

The manifest decides what is true: a worker that calls a shard bad is believed only if our own copy does not match its
digest. It decides nothing about who gets what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import trio

from client.asking import ANSWER_S, ask, channel_to, receive, within
from client.errors import HopRefused, HopViolation
from client.ports import ClientPorts
from client.routing import Hop
from protocol import limits
from protocol.channel import Channel
from protocol.errors import InputError
from protocol.ids import ShardDigest
from protocol.manifest import BlockEntry
from protocol.messages import SHARD, RefusalReason, ShardOffer, ShardPiece, ShardStored, ShardWanted

BUSY_RETRY_S = 0.5  # another client uploads the same shard: two processes of one owner may start together
PIECE_S = 60.0  # one piece of a shard, 1 MiB: slower than 17 KiB/s is as good as lost
CHECK_S = 300.0  # the worker hashes a whole shard, at worst 8 GiB from a disk


class ShardSource(Protocol):
    """Where the sealed shards are: node/directory.py, or memory in tests."""

    async def read(self, digest: ShardDigest, offset: int, max_bytes: int) -> bytes:
        """At least one byte from `offset` on. Raises InputError when the shard is missing or ends too soon."""


class ShardUpload:
    """Shards to one worker. `moved` hears of every change in the bytes that are there (negative: they were bad)."""

    def __init__(self, ports: ClientPorts, hop: Hop, source: ShardSource, moved: Callable[[int], None]) -> None:
        self._ports = ports
        self._hop = hop
        self._source = source
        self._moved = moved
        self._there = 0

    async def run(self, blocks: Mapping[int, BlockEntry]) -> None:
        """Raises HopRefused, HopLost, HopViolation, or InputError when a shard on this side is missing or changed."""
        for index, block in blocks.items():
            before = self._there
            try:
                await self._upload_when_free(block)
            except HopRefused as refused:
                if refused.reason != RefusalReason.BAD_SHARD:
                    raise
                self._add(before - self._there)
                await self._upload_again(index, block)

    async def _upload_when_free(self, block: BlockEntry) -> None:
        while True:
            try:
                return await self._upload_shard(block)
            except HopRefused as refused:
                if refused.reason != RefusalReason.BUSY:
                    raise
            await trio.sleep(BUSY_RETRY_S)

    async def _upload_again(self, index: int, block: BlockEntry) -> None:
        """The worker called the shard bad. What it kept of an earlier upload may have been: it has deleted that."""
        await self._check_own(index, block)
        try:
            await self._upload_shard(block)
        except HopRefused as refused:
            if refused.reason != RefusalReason.BAD_SHARD:
                raise
            raise HopViolation(self._hop.peer, "it calls a shard bad whose digest is right") from refused

    async def _upload_shard(self, block: BlockEntry) -> None:
        peer = self._hop.peer
        async with channel_to(self._ports, self._hop, SHARD) as channel:
            wanted = await ask(peer, channel, ShardOffer(block.digest, block.shard_bytes), ShardWanted, ANSWER_S)
            if wanted.offset > block.shard_bytes:
                raise HopViolation(peer, "it wants a shard from beyond its end")
            self._add(wanted.offset)
            await self._send_pieces(channel, block, wanted.offset)
            stored = await receive(peer, channel, ShardStored, CHECK_S)
        if stored.digest != block.digest:
            raise HopViolation(peer, "it stored another shard than the one that was sent")

    async def _send_pieces(self, channel: Channel, block: BlockEntry, offset: int) -> None:
        while offset < block.shard_bytes:
            size = min(limits.PIECE_BYTES, block.shard_bytes - offset)
            piece = await self._source.read(block.digest, offset, size)
            with within(self._hop.peer, PIECE_S):
                await channel.send(ShardPiece(offset), piece)
            offset += len(piece)
            self._add(len(piece))
            self._ports.observer.uploaded(self._hop.peer, len(piece))

    async def _check_own(self, index: int, block: BlockEntry) -> None:
        """Raises InputError when the shard on this side is not the one that the manifest names."""
        digest, offset = hashlib.sha256(), 0
        while offset < block.shard_bytes:
            piece = await self._source.read(block.digest, offset, min(limits.PIECE_BYTES, block.shard_bytes - offset))
            digest.update(piece)
            offset += len(piece)
        if digest.digest() != block.digest:
            raise InputError(f"the sealed shard of block {index} was changed since it was sealed; seal the model again")

    def _add(self, nbytes: int) -> None:
        self._there += nbytes
        self._moved(nbytes)
