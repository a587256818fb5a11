"""Every bound on the wire, each with its reason. Sizes in bytes unless the name says otherwise."""

from __future__ import annotations

KIB, MIB = 1 << 10, 1 << 20

# Frames. The length prefix is checked against the protocol's bound before a byte of the frame is kept.
HEADER_BYTES_MAX = MIB  # a manifest of 256 blocks is about 400 KiB; everything else is far smaller
STEP_BYTES_MAX = 32 * MIB  # a step's tensor: 1,024 positions of a model 8,192 wide in float32
STEP_NUMBERS_MAX = STEP_BYTES_MAX // 4  # of it in any dtype: a narrow one does not make a worker widen more
STEP_FRAME_BYTES_MAX = STEP_BYTES_MAX + HEADER_BYTES_MAX
CONTROL_BYTES_MAX = HEADER_BYTES_MAX + KIB  # control messages have no body
PIECE_BYTES = MIB  # one shard piece: large enough for bulk speed, small enough to share a stream
SHARD_FRAME_BYTES_MAX = PIECE_BYTES + 4 * KIB
STREAM_CHUNK_BYTES = MIB  # one write to a transport
TOGETHER_BYTES = 56 * KIB  # messages in one write, by workers counted without headers: a record of a direct connection
TOGETHER_MESSAGES = 32  # in one write, and dealt with before other tasks have their turn
READ_BYTES = 64 * KIB  # asked of a stream at a time: all that one record brings

# Containers inside a header.
ARRAY_ITEMS_MAX = 256  # any array: nested announcements of 2^20 items would take 8 MB each before the input ends
HEADER_ARRAYS_MAX = 1024  # no record but a manifest has 40; a million empty ones would hold up the event loop for 0.5 s
TENSOR_DIMS_MAX = 4
TENSOR_DIM_MAX = 1 << 24  # no vocabulary or width is near it; byte counts are products of Python's exact integers
BLOCKS_MAX = 256  # the deepest public model has 126 blocks
TENSORS_PER_BLOCK_MAX = 64
CONFIG_PAIRS_MAX = 64
MANIFEST_ARRAYS_MAX = 2 + BLOCKS_MAX * (3 + CONFIG_PAIRS_MAX + 3 * TENSORS_PER_BLOCK_MAX)  # the largest has so many
HOPS_MAX = 64
SHARD_BYTES_MAX = 8 << 30  # one block of a 400 B-parameter model in float32 is about 13 GB, in bfloat16 6.5 GB
SHARD_OVERHEAD_BYTES_MAX = MIB  # beside its weights: a safetensors header of a block is 1 KiB or so; more fills disks
PIECES_MAX = SHARD_BYTES_MAX // PIECE_BYTES  # their list is 256 KiB, one frame
PIECES_WANTED_MAX = 8  # in one request: several requests under way fill a long line, and none is long to finish
SHARD_SOURCES_MAX = 8  # besides the client: more would not make a fetch faster
NAME_CHARS_MAX = 64
DETAIL_CHARS_MAX = 512  # text of a refusal, for people
ADDR_CHARS_MAX = 128
ADDRS_MAX = 4
TICKET_BYTES_MAX = 2 * KIB

# Gossip. One node saturates at 60-100 messages a second; it should receive at most 6, reports included. Workers keep to
# that up to 300 of them. In a larger swarm they advertise every ADVERT_INTERVAL_MAX_S all the same, for how many there
# are is hearsay: who invents thousands must not silence the others. So a node receives 17 a second in an honest swarm
# of 1,000 (a fifth of a core), and more when many leases change. Above 1,200 each neighbour's allowance for what it
# forwards begins to cost adverts, and above 3,000 that of all together (60 new ones a second), of which a worker needs
# one in three to come through.
GOSSIP_BYTES_MAX = 4 * KIB  # any topic; larger RPCs risk the silent loss above 1 MiB and cost every node
ADVERT_BYTES_MAX = KIB
ADVERT_RTTS_MAX = 16
ADVERT_SPANS_MAX = 8
ADVERTS_RECEIVED_PER_S = 5.0
ADVERT_INTERVAL_MIN_S = 2.0  # a newcomer sees a small swarm within this time
ADVERT_INTERVAL_MAX_S = 60.0  # a newcomer sees any swarm within this time
ADVERT_LIFE_INTERVALS = 3  # two lost adverts do not make a peer vanish
CLOCK_SKEW_MAX_S = 30.0  # machines on NTP are within 1 s; a minute-old replay must not pass as new
PEERS_MAX = 20_000  # SwarmView entries: about 20 MB
ADVERT_LIFE_MAX_S = ADVERT_LIFE_INTERVALS * ADVERT_INTERVAL_MAX_S  # what the largest swarm needs
ADVERTS_PER_S = 1.0  # of one author: an honest one never sends two within a second
ADVERTS_BURST = 3  # in a row: some come late, and together
ADVERT_AUTHORS_PER_S = 5.0  # that are new, for identities are free: as many adverts as a node should receive
ADVERT_AUTHORS_BURST = 1000  # in a row, after a quiet time: a newcomer misses nobody in a swarm of so many

# Reports: what clients tell each other of strategies. Beside adverts a node should receive far fewer of them.
REPORT_BYTES_MAX = KIB
REPORT_COMPARISONS_MAX = 32  # of about 21 bytes: seven strategies in four or five kinds of situation
REPORT_LOG_RATIO_MAX = 300  # percent of a log: 20 times as dear, or a 20th; no strategy differs more
REPORT_FRESH_S = 300  # to be passed on; clients keep what they heard for longer
REPORT_INTERVAL_MIN_S = 60  # of one signer
REPORT_INTERVAL_S = 600.0  # of an honest one: requests change a summary slowly
REPORTS_RECEIVED_PER_S = 1.0  # of all signers, for identities are free: a hundredth of a core
REPORTS_BURST = 60  # in a row, after a quiet minute

# Sessions.
TICKET_LIFE_MAX_S = 3600.0
ANSWERS_KEPT_MAX = 64  # unacknowledged answers per session; a client acknowledges with each step
ANSWER_BYTES_KEPT_MAX = 64 * MIB  # per session: four chunks of a prefill at a width of 8,192
STEP_BYTES_WAITING_MAX = 64 * MIB  # per session at one hop: more in flight than any client needs
SESSIONS_PER_PEER_MAX = 64
SESSIONS_MAX = 1024
CONTEXT_TOKENS_MAX = 1 << 22
STEP_TOKENS_MAX = 8192  # one chunk of a prefill
STEP_US_MAX = 3_600_000_000  # an hour: no step that a client still waits for takes longer at one hop
DRAFTS_MAX = 16  # guesses in one step: more would need an acceptance above 0.95 to pay anywhere
MICRO_BATCHES_MAX = 16  # parts of a batch: more than the hops that are busy at the same time gains nothing
PAGE_TOKENS = 64  # one page of KV: a shared prefix is found to within so many tokens, an open session wastes half of it
PAGE_KEY_BYTES = 16  # of the keys of one tenant only, which would deceive itself
PAGE_KEYS_MAX = 2048  # a prefix of 131,072 tokens; 32 KiB

# Capabilities.
CAPABILITY_BYTES_MAX = 512  # a signed record of two ids, a name, four rights and a time
CAPABILITY_LIFE_MAX_S = 30 * 86_400.0  # how long a worker must remember that one was revoked
REVOKED_PER_OWNER_MAX = 256
REVOKED_MAX = 4096  # by all owners together: about 1 MB

# Leases.
LEASE_S_MAX = 3600  # what nobody renews is free again within the hour
LEASE_BYTES_MAX = 512  # a signed record of three names, two ids and six numbers
MANIFEST_BYTES_MAX = HEADER_BYTES_MAX - 2 * KIB  # the rest of LeaseSpan, its capability too, beside it

# Invites: text that people copy.
INVITE_PEERS_MAX = 4
INVITE_CHARS_MAX = 4096  # four peers with four addresses of 128 characters each
# Provider records (Kademlia).
PROVIDERS_MAX = 20  # peers returned for a key: as many as one lookup's closest peers
PROVIDER_LIFE_S = 3600.0  # a holder that vanished is forgotten within the hour
PROVIDE_AGAIN_S = PROVIDER_LIFE_S / 3  # two lost rounds do not make a holder vanish
PROVIDES_PER_S = 2.0  # a record goes to 20 peers, each with a stream of its own
