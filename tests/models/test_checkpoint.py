"""Opening checkpoints: what is read, and that every defect is refused with a message that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.checkpoint import Checkpoint
from models.errors import CheckpointError, ModelError, UnsupportedModel
from models.local import LocalModel
from tests.helpers.tiny_models import make_checkpoint, make_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture
def broken(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "broken"))


@pytest.fixture
def broken_sharded(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_tensors_come_as_they_are_stored_under_canonical_names(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    weights = make_model("llama").to(torch.bfloat16).state_dict()
    block = checkpoint.block(2)
    assert {name: tuple(tensor.shape) for name, tensor in block.items()} == checkpoint.config.blocks[2].tensor_shapes()
    assert torch.equal(block["down"], weights["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(block["attn_norm"], weights["model.layers.2.input_layernorm.weight"])
    assert block["q"].dtype == torch.bfloat16
    ends = checkpoint.ends()
    assert torch.equal(ends.embedding, weights["model.embed_tokens.weight"])
    assert torch.equal(ends.final_norm, weights["model.norm.weight"])
    assert torch.equal(ends.head, weights["lm_head.weight"])
    assert (checkpoint.name, checkpoint.config.eos_ids) == ("tiny", (1,))
    assert checkpoint.tokenizer_file == single / "tokenizer.json"


def test_several_files_hold_the_same_model_as_one(single: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(single), Checkpoint.open(str(sharded))
    assert one.config == many.config
    for index in range(one.config.num_blocks):
        expected = one.block(index)
        found = many.block(index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(one.ends().head, many.ends().head)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    ends = Checkpoint.open(folder).ends()
    assert ends.head is ends.embedding


def with_head(folder: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A tied checkpoint whose files hold a head all the same: what `head` makes of the embedding."""
    make_checkpoint(folder, "qwen2", tie_word_embeddings=True)
    edit_tensors(
        folder / "model.safetensors",
        lambda t: t.update({"lm_head.weight": head(t["model.embed_tokens.weight"].clone())}),
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_model_may_store_its_head_too(tmp_path: Path, dtype: torch.dtype) -> None:
    ends = Checkpoint.open(with_head(tmp_path, lambda embedding: embedding.to(dtype))).ends()
    assert ends.head is ends.embedding


def test_another_head_in_the_files_of_a_tied_model_is_the_head_as_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoint._ROWS", 100)  # the last of its rows alone is another

    def another(embedding: torch.Tensor) -> torch.Tensor:
        return torch.cat((embedding[:-1], embedding[-1:] + 1))

    folder = with_head(tmp_path, another)
    ends = Checkpoint.open(folder).ends()
    assert torch.equal(ends.head, another(ends.embedding))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(ends.head, theirs.get_output_embeddings().weight)
    assert torch.equal(ends.embedding, theirs.get_input_embeddings().weight)
    ids = [5, 319, 7]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(LocalModel(Checkpoint.open(folder)).logits(ids), expected, rtol=0, atol=1e-5)


def test_a_head_of_another_shape_is_refused_in_a_tied_model_too(tmp_path: Path) -> None:
    refuses(with_head(tmp_path, lambda embedding: embedding[:-1].clone()), "lm_head.weight", "[319, 32]", "[320, 32]")


def test_rotary_frequencies_of_old_files_are_ignored(broken: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(broken / "model.safetensors", lambda t: t.update({name: torch.zeros(4)}))
    assert Checkpoint.open(broken).config.num_blocks == 3


def test_the_fingerprint_is_of_contents(single: Path, broken: Path) -> None:
    fingerprint = Checkpoint.open(single).fingerprint()
    assert fingerprint == Checkpoint.open(broken).fingerprint()
    assert len(fingerprint) == 64
    (broken / "tokenizer.json").write_text("{}")
    assert Checkpoint.open(broken).fingerprint() == fingerprint
    edit_tensors(broken / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    changed = Checkpoint.open(broken).fingerprint()
    assert changed != fingerprint
    edit_json(broken / "config.json", lambda c: c.update(rms_norm_eps=1e-4))
    assert Checkpoint.open(broken).fingerprint() not in (changed, fingerprint)


def test_copies_of_a_model_are_alike_and_others_are_not(single: Path, sharded: Path, tmp_path: Path) -> None:
    likeness = Checkpoint.open(single).likeness()
    assert len(likeness) == 64
    wide = make_checkpoint(tmp_path / "wide", dtype=torch.float32)
    edit_tensors(wide / "model.safetensors", lambda t: t.update({name: t[name].bfloat16().float() for name in t}))
    for copy in (sharded, wide):
        assert Checkpoint.open(copy).likeness() == likeness
    others = {Checkpoint.open(make_checkpoint(tmp_path / "seed", seed=1)).likeness()}
    for number, part in enumerate(("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight")):
        tuned = Path(shutil.copytree(single, tmp_path / str(number)))
        edit_tensors(tuned / "model.safetensors", lambda t, part=part: t[part].mul_(1.125))
        others.add(Checkpoint.open(tuned).likeness())
    edit_json(tuned / "config.json", lambda c: c.update(rms_norm_eps=1e-4))
    others.add(Checkpoint.open(tuned).likeness())
    assert len(others - {likeness}) == 5


def test_a_tied_head_makes_no_difference_whether_it_is_there_or_not(tmp_path: Path) -> None:
    without = make_checkpoint(tmp_path / "without", "qwen2", tie_word_embeddings=True)
    there = with_head(tmp_path / "there", lambda embedding: embedding)
    assert Checkpoint.open(there).likeness() == Checkpoint.open(without).likeness()


def refuses(folder: Path | str, *said: str, error: type[ModelError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path, single: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere", "no such folder")
    refuses(single / "config.json", "is a file; name the folder")


@pytest.mark.parametrize("place", ["x" * 5000, "~nobody-of-this-name/model", "nul\0byte", "", "a/b/c", "../a", "-"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id(place: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(place)
    assert len(str(caught.value)) < 600


def test_a_home_folder_is_found(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    assert Checkpoint.open("~/tiny").name == "tiny"


def test_a_single_file_goes_before_an_index(broken: Path) -> None:
    (broken / INDEX).write_text("{}")
    assert Checkpoint.open(broken).config.num_blocks == 3


def test_a_missing_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    refuses(broken, "config.json", "no such file")


@pytest.mark.parametrize("text", ["{", "[]", "", '"' + "\\ud800", "[" * 100_000])
def test_a_config_that_is_no_object(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refuses(broken, "config.json", "download it again")


def test_a_config_that_is_not_text(broken: Path) -> None:
    (broken / "config.json").write_bytes(b"\xff\xfe\x00")
    refuses(broken, "config.json")


def test_an_unsupported_architecture_is_named_with_the_supported_list(broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
    refuses(broken, str(broken), "GPT2LMHeadModel", "Qwen3ForCausalLM", error=UnsupportedModel)


def test_missing_tensor_files(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refuses(broken, "model.safetensors", "no such file")
    (broken / "pytorch_model.bin").write_bytes(b"")
    refuses(broken, "convert the pickled weights")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_tensor_file(broken: Path, keep: int) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(broken, "model.safetensors", "truncated", "download it again")


def test_a_header_that_asks_for_more_than_there_is(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    refuses(broken, "model.safetensors", "truncated")


def test_a_missing_tensor(broken: Path) -> None:
    edit_tensors(broken / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(broken, "model.layers.1.mlp.up_proj.weight", "1 missing")


def test_a_missing_head_of_an_untied_model(broken: Path) -> None:
    edit_tensors(broken / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    refuses(broken, "lm_head.weight", "tie_word_embeddings is false")


def test_a_tensor_that_the_config_does_not_know(broken: Path) -> None:
    """Dropping a bias silently would give a model that is almost right."""
    name = "model.layers.1.self_attn.q_proj.bias"
    edit_tensors(broken / "model.safetensors", lambda t: t.update({name: torch.zeros(32)}))
    refuses(broken, name, "does not account for", "download it again")


def test_a_wrong_shape(broken: Path) -> None:
    edit_json(broken / "config.json", lambda c: c.update(intermediate_size=47))
    refuses(broken, "model.safetensors", "mlp", "47", "download it again")


def test_a_quantised_tensor(broken: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(broken / "model.safetensors", lambda t: t.update({name: t[name].to(torch.int8)}))
    refuses(broken, name, "I8", "quantised")


def test_an_index_that_names_a_missing_file(broken_sharded: Path) -> None:
    lost = sorted(broken_sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    refuses(broken_sharded, lost.name, "no such file", INDEX)


def test_an_index_that_puts_a_tensor_where_it_is_not(broken_sharded: Path) -> None:
    first, second = sorted(file.name for file in broken_sharded.glob("model-*.safetensors"))[:2]

    def move(index: dict[str, Any]) -> None:
        name = min(name for name, file in index["weight_map"].items() if file == first)
        index["weight_map"][name] = second

    edit_json(broken_sharded / INDEX, move)
    refuses(broken_sharded, second, "has no tensor", "download it again")


OUTSIDE = ["../broken/model-00001-of-00002.safetensors", "/etc/passwd", "..", "sub/m.safetensors", "C:\\m.safetensors"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_an_index_that_points_outside_the_folder(broken_sharded: Path, place: str) -> None:
    edit_json(broken_sharded / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": place}))
    refuses(broken_sharded, INDEX, repr(place), "do not trust it")


@pytest.mark.parametrize("mapping", [None, [], {"lm_head.weight": 3}])
def test_an_index_without_a_map(broken_sharded: Path, mapping: object) -> None:
    edit_json(broken_sharded / INDEX, lambda i: i.update(weight_map=mapping))
    refuses(broken_sharded, INDEX, "weight_map")


def test_a_file_that_vanishes_after_opening(broken: Path) -> None:
    checkpoint = Checkpoint.open(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        _ = checkpoint.tokenizer_file
    (broken / "model.safetensors").unlink()
    for use in (lambda: checkpoint.block(0), checkpoint.ends, checkpoint.fingerprint, checkpoint.likeness):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            use()


def test_the_hub_is_asked_for_named_files_only(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(single)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert Checkpoint.open("someone/some-model").name == "someone/some-model"
    assert asked["repo_id"] == "someone/some-model"
    assert not any(pattern.endswith((".bin", ".py", ".pth")) or pattern == "*" for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses("someone/some-model", "someone/some-model", "check the name and the connection", "local folder")
