"""The parts of training and measuring that can be checked without training: windows, schedule, dropout."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sotto.demo import evaluate, train  # noqa: E402
from sotto.demo.corpus import Document  # noqa: E402

SMALL = train.Shape(blocks=1, width=16, inner=32, heads=2, kv_heads=1)
DOCUMENTS = [
    Document(f"d{i}", "\n\n".join(f"This is sentence {i} and {j} of a text about nothing." * 3 for j in range(40)))
    for i in range(30)
]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train.train_tokenizer(DOCUMENTS)


@pytest.mark.parametrize("length", [2, 100, 1025, 1026, 1600, 3000])
def test_each_token_of_a_document_is_a_target_once(length: int) -> None:
    ids = list(range(length))
    windows = list(evaluate._windows(ids))
    assert [int(token) for _, targets in windows for token in targets] == ids[1:]
    for inputs, targets in windows:
        assert len(targets) <= len(inputs) <= evaluate.CONTEXT
        assert int(inputs[-1]) + 1 == int(targets[-1])
    assert all(len(inputs) == evaluate.CONTEXT for inputs, _ in windows[1:])


def test_a_uniform_model_needs_the_entropy_of_the_vocabulary(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = train.build_model(SMALL)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = len(tokenizer.encode(DOCUMENTS[0].text).ids) - 1
    bits = evaluate.bits_per_byte(model, tokenizer, DOCUMENTS[:1])
    assert bits == pytest.approx(11 * tokens / len(DOCUMENTS[0].text), rel=1e-4)


def test_a_model_agrees_with_itself(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = train.build_model(SMALL)
    assert evaluate.agreement(model, model, [tokenizer.encode(DOCUMENTS[0].text).ids]) == 1.0


def test_continuation_repeats_with_its_seed_and_grows_by_what_was_asked(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = train.build_model(SMALL).train(False)
    how = evaluate.Decoding(5, temperature=0.8, seed=3)
    ids = evaluate.continuation(model, tokenizer, "This is", how)
    assert ids == evaluate.continuation(model, tokenizer, "This is", how)
    assert len(ids) <= len(tokenizer.encode("This is").ids) + 5


@pytest.mark.parametrize("length", [train.SHORT_WINDOW, train.CONTEXT])
def test_windows_fill_a_step_and_begin_with_bos(tokenizer, length: int) -> None:  # type: ignore[no-untyped-def]
    batch = next(train.Windows(DOCUMENTS, tokenizer, seed=1).batches(length))
    assert batch.shape == (train.TOKENS_PER_STEP // length, length + 1)
    assert bool((batch[:, 0] == train.BOS).all())


def test_windows_come_in_the_order_of_their_seed(tokenizer) -> None:  # type: ignore[no-untyped-def]
    first, again, other = (next(train.Windows(DOCUMENTS, tokenizer, seed).batches(256)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_learning_rate_warms_up_then_falls() -> None:
    recipe = train.Recipe(steps=1000, learning_rate=1.0, dropout=0.0)
    rates = [train._schedule(step, recipe) for step in range(1, 1001)]
    assert rates[train.WARM_UP_STEPS - 1] == pytest.approx(1.0, abs=1e-3)
    assert rates[: train.WARM_UP_STEPS] == sorted(rates[: train.WARM_UP_STEPS])
    assert rates[train.WARM_UP_STEPS :] == sorted(rates[train.WARM_UP_STEPS :], reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_dropout_acts_in_training_only() -> None:
    model = train.build_model(SMALL)
    train.add_dropout(model, 0.5)
    ids = torch.arange(8)[None]
    model.train(True)
    noisy = [model(input_ids=ids).logits for _ in range(2)]
    model.train(False)
    still = [model(input_ids=ids).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*still)


def test_shapes_are_what_the_model_card_says() -> None:
    sizes = [sum(p.numel() for p in train.build_model(shape).parameters()) for shape in (train.TARGET, train.DRAFT)]
    assert sizes == [4_877_568, 625_280]
    assert dataclasses.asdict(train.TARGET)["blocks"] == 6


def test_a_saved_model_is_five_files_and_loads_again(tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    train.save(train.build_model(SMALL), tokenizer, tmp_path)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert evaluate.load_model(tmp_path).config.num_hidden_layers == 1
    assert evaluate.load_tokenizer(tmp_path).encode("This").ids == tokenizer.encode("This").ids
