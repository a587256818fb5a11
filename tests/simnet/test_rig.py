"""What `sotto bench engine` says that a token reads: the denominators of its shares of the memory limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio

from client.sealing import Sealer
from models.checkpoint import Checkpoint
from models.int8 import Int8Linear
from node.cores import cores
from protocol.errors import InputError
from protocol.ids import ID_BYTES, DeploymentId
from simnet.bench.engine.agreement import agreement
from simnet.bench.engine.decode import message_bytes
from simnet.bench.library import Library
from simnet.bench.paired import Budget
from simnet.bench.rig import Bench, Rig, Sizes, Work
from tests.helpers.tiny_models import make_checkpoint


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_token_reads_blocks_and_head_as_they_are_kept(tmp_path: Path, dtype: str, size: int) -> None:
    place = make_checkpoint(tmp_path / "model")
    model, config = Checkpoint.open(str(place)), Checkpoint.open(str(place)).config
    bench = Bench(tmp_path, place, "", Sizes(), Budget(0.0, 1), print)
    numbers = sum(block.num_parameters for block in config.blocks) + config.vocab_size * config.hidden_size
    assert Rig(bench, dtype).bytes_per_token(dtype) == size * numbers
    head = Sealer.open(model, dtype, None, DeploymentId(bytes(ID_BYTES))).ends().head
    assert isinstance(head, Int8Linear) == (dtype == "int8"), "the head is kept as the blocks are"
    assert head.dtype == (torch.bfloat16 if dtype == "bfloat16" and head.is_packed else torch.float32)


@pytest.mark.parametrize("context", [64, 100, 1000, 20_000])
def test_all_that_is_measured_fits_into_the_context(context: int) -> None:
    sizes = Sizes().within(context)
    longest = (
        sizes.prompt_tokens + sizes.new_tokens,
        sizes.prefill_tokens + 1,
        sizes.long_tokens + 1,
        sizes.trace_tokens_max,
        sizes.prefix_tokens + sizes.own_tokens + 2,
    )
    assert max(longest) <= context
    assert min(*longest, sizes.own_tokens, sizes.new_tokens) > 2
    assert (sizes == Sizes()) == (context == 20_000)
    with pytest.raises(InputError, match="holds 20 tokens"):
        Sizes().within(20)


def test_each_opponent_gets_the_threads_that_are_best_for_its_own_work(tmp_path: Path) -> None:
    """The plain one is faster with one thread, the one with our product with more; but not where it only prefills."""
    tried: list[tuple[int, int, int]] = []

    class Opponent:
        def __init__(self, better: int) -> None:
            self.better = better

        def generate(self, prompts: list[list[int]], new_tokens: int, threads: int) -> float:
            tried.append((len(prompts), len(prompts[0]), new_tokens))
            return 2.0 if (threads == 1) == (self.better == 1 or new_tokens == 1) else 1.0

    place = make_checkpoint(tmp_path / "model")
    rig = Rig(Bench(tmp_path, place, "", Sizes(), Budget(0.0, 1), print), "float32")
    rig._libraries = {False: Opponent(1), True: Opponent(2)}  # type: ignore[dict-item]
    work, most = Work(16, 64, 32), min(3, cores())

    async def main() -> None:
        threads = await rig.threads(work)
        assert threads == {"workers": 3, "client": 1, "transformers": 1, "transformers_same_kernel": most}
        assert await rig.library_threads(Work(4, 256), same_kernel=True) == 1

    trio.run(main)
    assert set(tried) == ({(16, 16, 8), (4, 64, 1)} if most > 1 else set())


def test_an_opponent_with_our_product_in_int8_computes_as_our_blocks_do(tmp_path: Path) -> None:
    place = make_checkpoint(tmp_path / "model")
    answers = [Library(place, "float32", product).greedy([5, 6, 7], 4)[1] for product in (None, "float32", "int8")]
    plain, packed, rounded = (torch.stack(logits) for logits in answers)
    assert float((plain - packed).abs().max()) < 1e-4 < float((plain - rounded).abs().max()) < float(plain.abs().max())


def test_agreement_is_of_tokens_and_of_logits() -> None:
    expected = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 0.0])]
    got = [torch.tensor([0.0, 1.5, 0.0]), torch.tensor([0.5, 1.0, 0.0])]
    figures = agreement(expected, got)
    assert (figures["tokens"], figures["same_token"], figures["largest_logit_difference"]) == (2, 0.5, 2.5)


def test_a_message_in_eight_bits_has_factors_too() -> None:
    assert [message_bytes(wire, 768) for wire in ("float32", "bfloat16", "int8")] == [3072, 1536, 768 + 2 * 12]
