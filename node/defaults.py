"""What holds unless told otherwise, for those that may not load what it is for: commands load no torch."""

KV_TOKENS = 4096  # one long chat, or several short requests
LISTEN = "/ip4/0.0.0.0/tcp/4517"  # where a worker listens
