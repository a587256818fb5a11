"""What node/p2p relies on in py-libp2p beyond its documented interface.

A new version that changes one of these must fail here, by name, before it fails somewhere else.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import trio
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.io import BaseNoiseMsgReadWriter
from libp2p.security.noise.patterns import BasePattern, PatternXX
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from noise.connection import NoiseConnection

from node.p2p.host import _Muxers, _NoAutoConnector
from node.p2p.mesh import MeshConfig, open_mesh
from node.p2p.yamux import Yamux
from tests.conformance.adapters import full_addr, seed_of


def test_the_version_is_the_one_that_was_measured():
    assert version("libp2p") == "0.8.1"


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (TCP, "_dial_resolved"),
        (TCP, "create_listener"),
        (MuxerMultistream, "new_conn"),
        (AutoConnector, "maybe_connect"),
        (Swarm, "dial_addr"),
        (Swarm, "dial_peer"),
        (Swarm, "get_connections"),
        (Swarm, "remove_conn"),
        (SwarmConn, "close"),
        (NetStream, "remove"),
        (Pubsub, "push_msg"),
        (Pubsub, "_is_msg_seen"),
        (Pubsub, "_mark_msg_seen"),
        (Pubsub, "validate_msg"),
        (Pubsub, "_handle_dead_peer"),
        (Pubsub, "_handle_new_peer"),
        (Pubsub, "_peer_is_connected"),
        (GossipSub, "remove_peer"),
        (BasicHost, "new_stream"),
        (BasicHost, "get_addrs"),
        (BasicHost, "get_transport_addrs"),
        (Swarm, "upgrade_outbound_raw_conn"),
        (Swarm, "upgrade_inbound_raw_conn"),
        (TransportUpgrader, "upgrade_security"),
    ],
)
def test_what_is_overridden_or_called_exists(owner, method):
    assert inspect.isfunction(getattr(owner, method))


@pytest.mark.parametrize(
    ("function", "uses"),
    [
        (TransportUpgrader.upgrade_connection, "self.muxer_multistream.new_conn("),
        (TransportUpgrader.__init__, "self.muxer_multistream ="),
        (MuxerMultistream.__init__, "self._selector ="),
        (MuxerMultistream.new_conn, "self._selector.select("),
        (Swarm.__init__, "self.upgrader = upgrader"),
        (Swarm._best_connection, "ConnectionType.DIRECT"),  # new streams leave the relay once there is a direct one
        (Swarm.upgrade_inbound_raw_conn, "await self.add_conn(muxed_conn"),
        (Swarm.upgrade_outbound_raw_conn, "await self.add_conn(muxed_conn"),
        (Swarm.add_conn, "self.connections[peer_id].append(swarm_conn)"),
        (SwarmConn.close, "self.event_closed.set()"),
        (SwarmConn._cleanup, "self.swarm.remove_conn(self)"),
        (Swarm.new_stream, "connections = await self.dial_peer(peer_id)"),
        (Swarm.set_stream_handler, "self.common_stream_handler = stream_handler"),
        (SwarmConn._handle_muxed_stream, "self.swarm.common_stream_handler("),
        (Swarm.run, "self.auto_connector.run_background_task("),
        (Pubsub.stream_handler, "await self.continuously_read_stream(stream)"),
        (Pubsub.stream_handler, "except (StreamError, ParseError, IncompleteReadError)"),
        (Pubsub.continuously_read_stream, "self.handle_subscription(peer_id, message)"),
        (Pubsub.continuously_read_stream, "await self.router.handle_rpc(rpc_incoming, peer_id)"),
        (Pubsub.stream_handler, "self._handle_dead_peer(peer_id)"),
        (Pubsub.handle_dead_peer_queue, "self._handle_dead_peer(peer_id)"),
        (GossipSub._add_back_off, "self.back_off[topic][peer] = "),
        (Pubsub.handle_peer_queue, "self.manager.run_task(self._handle_new_peer_with_retry, peer_id)"),
        (Pubsub._peer_stream_retry_task, "await self._handle_new_peer_with_retry(peer_id)"),
        (Pubsub._handle_new_peer_with_retry, "await self._handle_new_peer(peer_id)"),
        (Pubsub._handle_new_peer_with_retry, "except Exception as error:"),  # it gives up
        (Pubsub._handle_new_peer, "self.peers[peer_id] = stream"),
        (Pubsub._handle_new_peer, "self.peer_queues[peer_id] = queue"),
        (Pubsub.push_msg, "self.validate_msg(msg_forwarder, msg)"),
        (GossipSub.__init__, "self.mesh = {}"),
        (Pubsub.push_msg, "await self.router.publish(msg_forwarder, msg)"),
        (Pubsub.publish, "await self.push_msg("),
        (GossipSub.publish, "self.recent_message_deliveries[topic].append("),
        (BasicHost._schedule_identify, "self._identify_tasks.add("),
        (BasicHost._identify_task_entry, "await self._identify_peer(peer_id, reason=reason)"),
        (PeerStore.add_addrs, "self._enforce_peer_limit()"),
        (PeerStore.add_addr, "self.add_addrs("),
        (TCP.dial, "self._dial_resolved("),
        (Swarm._do_handle_inbound_connection, "self.upgrade_inbound_raw_conn(raw_conn"),
        (PatternXX.__init__, "self.prologue = prologue"),
        (PatternXX.handshake_inbound, "self.create_noise_state(prologue=self.prologue)"),
        (PatternXX.handshake_outbound, "self.create_noise_state(prologue=self.prologue)"),
        (PatternXX.handshake_outbound, "raise PeerIDMismatchesPubkey("),
        (BasePattern.create_noise_state, "noise_state.noise_protocol.prologue = prologue"),
        (SecureSession.__init__, "self.conn = conn"),
        (BaseNoiseMsgReadWriter.__init__, "self.noise_state = noise_state"),
        (NoiseConnection.encrypt, "self.noise_protocol.cipher_state_encrypt.encrypt_with_ad(None, data)"),
        (NoiseConnection.decrypt, "self.noise_protocol.cipher_state_decrypt.decrypt_with_ad(None, data)"),
    ],
)
def test_the_library_still_goes_through_what_is_replaced(function, uses):
    assert uses in inspect.getsource(function)


def test_the_replacements_are_in_place():
    async def main():
        async with open_mesh(MeshConfig(seed_of("a"))) as a, open_mesh(MeshConfig(seed_of("b"))) as b:
            await a.connect(full_addr(b))
            swarm = a._host.swarm
            assert isinstance(swarm.upgrader.muxer_multistream, _Muxers)
            assert isinstance(swarm.auto_connector, _NoAutoConnector)
            (conn,) = [conn for conns in swarm.connections.values() for conn in conns]
            assert isinstance(conn.muxed_conn, Yamux)
            assert str(list(swarm.upgrader.security_multistream.transports)) == "['/noise']"

    trio.run(main)
