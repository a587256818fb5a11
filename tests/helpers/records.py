"""A record of a request, others that differ from it, and the configuration of a small model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.metalearning.features import ModelFeatures, RouteFeatures, TaskFeatures
from client.metalearning.record import Outcome, Prediction, Record
from models.config import BlockConfig, ModelConfig, RopeConfig
from protocol.strategy import Strategy

BLOCK = BlockConfig(
    family="llama",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position=512,
    rope=RopeConfig(10_000.0),
)
CONFIG = ModelConfig(
    vocab_size=1000,
    blocks=(BLOCK,) * 4,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    eos_ids=(2,),
    max_position=512,
)

RECORD = Record(
    uid="00" * 16,
    at_ms=1_760_000_000_000,
    origin="request",
    simulated=False,
    version="0.1.0",
    torch="2.13.0",
    hardware="a processor, 2 cores",
    model="demo",
    tier="ee",
    chosen_by="user",
    strategy=Strategy(speculation="lookup", prefix_cache=False),
    model_features=ModelFeatures(
        family="llama",
        layers=6,
        width=256,
        mlp_width=768,
        heads=8,
        kv_heads=2,
        vocabulary=4096,
        context=1024,
        parameters=4_000_000,
        weight_bytes=4.0,
    ),
    route=RouteFeatures(
        hops=2,
        span_us=(1234567.5, 80.0),
        leg_rtt_ms=(0.5, 20.25, 0.5),
        compute_us=1234647.5,
        compute_us_max=1234567.5,
        rtt_ms=10.625,
        rtt_ms_max=20.25,
        bandwidth_mbit_s=None,
        read_gb_s_min=12.5,
        gflop_s_min=80.0,
        gpus=0,
        kv_free_tokens=8192,
        load_percent_max=10,
        relayed=1,
    ),
    task=TaskFeatures(
        prompt_tokens=40,
        max_new_tokens=64,
        concurrency=1,
        shared_prefix=0.4,
        repetition=0.125,
        temperature=0.8,
        objective="latency",
        exact=True,
    ),
    predicted=Prediction(token_s=0.0125),
    measured=Outcome(
        tokens=64,
        ttft_s=0.1,
        token_s=0.0121,
        total_s=0.9,
        tokens_per_s=82.5,
        bytes_out=100_000,
        bytes_in=64_000,
        drafted=10,
        accepted=7,
        prefix_tokens=0,
        finish="length",
        error="",
        preemptions=0,
        losses=0,
        kv_bytes=98_304,
    ),
)


def numbered(number: int, **other: Any) -> Record:
    """Like RECORD, with a uid of its own."""
    return replace(RECORD, uid=f"{number:032x}", **other)
