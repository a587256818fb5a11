// js-libp2p as a foreign client of sotto: does what the one JSON argument says, prints what it saw as one JSON object.
//   {"dial": ADDR, "ping": true, "topic": TOPIC, "key": HEX, "echo": {"protocol": P, "bytes": N}, "circuit": ADDR}
import { createHash, randomBytes } from 'node:crypto'

import { circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'

// Node 20 lacks it, and some of the packages use it.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}

const { createLibp2p } = await import('libp2p')
const { CID } = await import('multiformats/cid')
const { create } = await import('multiformats/hashes/digest')

const SHA256 = 0x12
const RAW = 0x55

async function newNode () {
  return createLibp2p({
    transports: [tcp(), circuitRelayTransport()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    connectionGater: { denyDialMultiaddr: () => false },
    services: {
      identify: identify(),
      ping: ping({ maxOutboundStreams: 8 }), // its Kademlia pings too, and by default there may be one at a time
      pubsub: gossipsub({ fallbackToFloodsub: false }),
      dht: kadDHT({ protocol: '/sotto/kad/1.0.0', clientMode: true, peerInfoMapper: passthroughMapper })
    }
  })
}

async function firstMessage (node, topic) {
  const { promise, resolve } = Promise.withResolvers()
  node.services.pubsub.addEventListener('message', ({ detail }) => {
    if (detail.topic === topic) resolve({ author: detail.from.toString(), data: Buffer.from(detail.data).toString('base64') })
  })
  node.services.pubsub.subscribe(topic)
  return promise
}

async function providersOf (node, key) {
  const found = new Map()
  const cid = CID.createV1(RAW, create(SHA256, Buffer.from(key, 'hex')))
  for await (const event of node.services.dht.findProviders(cid, { signal: AbortSignal.timeout(20_000) })) {
    for (const provider of event.name === 'PROVIDER' ? event.providers : (event.name === 'PEER_RESPONSE' ? event.providers : [])) {
      found.set(provider.id.toString(), provider.multiaddrs.map(String))
    }
  }
  return Object.fromEntries(found)
}

async function provide (node, key) {
  const cid = CID.createV1(RAW, create(SHA256, Buffer.from(key, 'hex')))
  let told = 0
  for await (const event of node.services.dht.provide(cid, { signal: AbortSignal.timeout(20_000) })) {
    told += event.name === 'PEER_RESPONSE' && event.messageName === 'ADD_PROVIDER' ? 1 : 0
  }
  return told
}

// Sends random bytes, half-closes, and reads what comes back: true when it is the same.
async function echoed (stream, size) {
  const [sent, got] = [createHash('sha256'), createHash('sha256')]
  const reading = (async () => {
    let count = 0
    for await (const part of stream) {
      got.update(part.subarray())
      count += part.byteLength
    }
    return count
  })()
  for (let left = size; left > 0;) {
    const part = randomBytes(Math.min(left, 100_000))
    left -= part.length
    sent.update(part)
    if (!stream.send(part)) await stream.onDrain()
  }
  await stream.close()
  return (await reading) === size && sent.digest('hex') === got.digest('hex')
}

const wanted = JSON.parse(process.argv[2])
const seen = {}
const node = await newNode()
try {
  const connection = await node.dial(multiaddr(wanted.dial))
  seen.peer = connection.remotePeer.toString()
  if (wanted.ping) seen.ping_ms = await node.services.ping.ping(connection.remotePeer)
  if (wanted.topic) seen.message = await firstMessage(node, wanted.topic)
  if (wanted.key) seen.providers = await providersOf(node, wanted.key)
  if (wanted.provide) seen.told = await provide(node, wanted.provide)
  if (wanted.echo) {
    seen.echoed = await echoed(await connection.newStream(wanted.echo.protocol), wanted.echo.bytes)
  }
  if (wanted.circuit) {
    const through = await node.dial(multiaddr(wanted.circuit))
    seen.circuit = { peer: through.remotePeer.toString(), addr: through.remoteAddr.toString(), limits: through.limits ?? null }
    seen.circuit.ping_ms = await node.services.ping.ping(multiaddr(wanted.circuit))
    if (wanted.echo) seen.circuit.echoed = await echoed(await through.newStream(wanted.echo.protocol), wanted.echo.bytes)
  }
  if (wanted.serve) {
    seen.served = 0
    await node.handle(wanted.serve, async (stream) => {
      for await (const part of stream) {
        seen.served += part.byteLength
        if (!stream.send(part)) await stream.onDrain()
      }
      await stream.close()
    })
    console.log(JSON.stringify({ serving: node.peerId.toString() }))
    for await (const _ of process.stdin) { /* until the end of standard input */ }
  }
} finally {
  await node.stop()
}
console.log(JSON.stringify(seen))
process.exit(0)
