"""A tiny model, tokenizer and data set, written to disk in the formats of the Hugging Face hub and read by the kit."""

import json
import sys

import pytest
import torch
from torch import nn

from lossbook import lab, ops

pytestmark = pytest.mark.usefixtures("no_network")
transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, torchvision):  # transformers imports torchvision where it is installed
    """A GPT-2 of 600 weights with a tokenizer of words, saved by transformers itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "cat": 2, "sat": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = transformers.GPT2Config(
        vocab_size=4, bos_token_id=0, eos_token_id=0, n_positions=8, n_embd=8, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(sizes).save_pretrained(path)
    return path


def test_model_and_tokenizer_come_from_a_folder(folder):
    model, tokenizer = lab.load_language_model(folder)
    assert not model.training and tokenizer.pad_token == "<end>"
    tokens = torch.tensor(tokenizer(["a cat sat", "cat a a"]).input_ids)
    assert tokens.tolist() == [[1, 2, 3], [2, 1, 1]]
    with torch.no_grad():
        logits = model.model(tokens).logits
        torch.testing.assert_close(model(tokens), logits)
        assert model.hidden(tokens).shape == (2, 3, 8) and model.output_weight.shape == (4, 8)
        mask = torch.tensor([[False, True, True], [False, False, True]])
        ours = ops.sequence_logprobs(model.hidden(tokens), model.output_weight, tokens, mask)
    logprobs = logits.log_softmax(-1)
    expected = torch.stack([logprobs[0, 0, 2] + logprobs[0, 1, 3], logprobs[1, 1, 1]])
    torch.testing.assert_close(ours, expected)


def test_padding_changes_nothing(folder):
    model, tokenizer = lab.load_language_model(folder, dtype=torch.float64)
    batch = tokenizer(["a cat sat", "cat"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    with torch.no_grad():
        alone = model.hidden(batch.input_ids[1:, :1])
        padded = model.hidden(batch.input_ids, batch.attention_mask)
    assert padded.dtype == torch.float64
    torch.testing.assert_close(padded[1:, :1], alone)


def test_gradients_reach_the_tied_weight(folder):
    model, _ = lab.load_language_model(folder)
    tokens = torch.tensor([[1, 2, 3]])
    ops.sequence_logprobs(model.hidden(tokens), model.output_weight, tokens, tokens > 1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_model_without_linear_output_is_refused():
    with pytest.raises(TypeError, match="model must have a decoder and a linear output layer"):
        lab.PretrainedTransformer(nn.Linear(2, 2))


def test_missing_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        lab.load_language_model(tmp_path)
    with pytest.raises(OSError):
        lab.load_language_model(tmp_path / "none")


def test_data_set_comes_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no", "score": i} for i in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    for streaming in (False, True):
        loaded = lab.load_hub_dataset(tmp_path / "data", ["chosen", "prompt"], streaming=streaming)
        assert [dict(record) for record in loaded] == [{"chosen": "yes", "prompt": f"p{i}"} for i in range(3)]
    assert len(lab.load_hub_dataset(tmp_path / "data", ["score"], split="train[:2]")) == 2
    with pytest.raises(ValueError, match="columns must be among prompt, chosen, rejected, score, got answer"):
        lab.load_hub_dataset(tmp_path / "data", ["prompt", "answer"])
    with pytest.raises(ValueError):
        lab.load_hub_dataset(tmp_path / "data", ["prompt"], split="test")
    with pytest.raises(FileNotFoundError):
        lab.load_hub_dataset(tmp_path / "none", ["prompt"])


@pytest.mark.parametrize(
    ("library", "load"),
    [
        ("transformers", lambda: lab.load_language_model("x")),
        ("datasets", lambda: lab.load_hub_dataset("x", ["y"])),
    ],
)
def test_missing_library_is_named(library, load, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{library}: pip install lossbook\[full\]"):
        load()
