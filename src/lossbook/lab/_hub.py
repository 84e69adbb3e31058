"""Language models and data sets of the Hugging Face hub, for the profile `full`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


class PretrainedTransformer(nn.Module):
    """A causal language model of ``transformers`` behind the names of :class:`Transformer`.

    Args:
        model: a ``transformers`` model for causal language modelling, whose logits are linear in its last hidden states.

    Input int64 ``(B, T)``; output logits ``(B, T, V)``, where position t has seen tokens 0 to t.

    Raises:
        TypeError: ``model`` has no decoder or no linear output layer.
    """

    def __init__(self, model: Any):
        super().__init__()
        layer = getattr(model, "get_output_embeddings", lambda: None)()
        if not hasattr(model, "get_decoder") or not isinstance(layer, nn.Linear) or layer.bias is not None:
            raise TypeError(
                f"model must have a decoder and a linear output layer without bias, got {type(model).__name__}"
            )
        self.model = model

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the last hidden states ``(B, T, dim)``; times ``output_weight.T`` they are the logits.

        Args:
            tokens: int64 ``(B, T)``.
            mask: bool or int64 ``(B, T)``, true at tokens that are not padding; None where there is no padding.
        """
        return self.model.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer ``(V, dim)``, one row a token."""
        return self.model.get_output_embeddings().weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.hidden(tokens, mask) @ self.output_weight.T


def load_language_model(name: str | Path, **options: Any) -> tuple[PretrainedTransformer, Any]:
    """Load a causal language model and its tokenizer through ``transformers``.

    Args:
        name: a model of the Hugging Face hub, such as ``"openai-community/gpt2"``, or a folder that holds one.
        options: handed to ``AutoModelForCausalLM.from_pretrained``, such as ``dtype=torch.bfloat16``.

    Returns:
        The model, in evaluation mode, and its tokenizer; one without a padding token pads with its end-of-text token.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such model.
        ValueError: the folder holds none.
        TypeError: its logits are not linear in its last hidden states.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("this model comes through transformers: pip install lossbook[full]") from error
    model = PretrainedTransformer(AutoModelForCausalLM.from_pretrained(name, **options)).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_hub_dataset(
    name: str | Path,
    columns: Sequence[str],
    *,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Any:
    """Load a data set through ``datasets``, and see that it has the columns that are needed.

    Args:
        name: a data set of the Hugging Face hub, such as ``"stanfordnlp/imdb"``, or a folder that holds one.
        columns: the columns to keep, in this order.
        config: the configuration, where the data set has several.
        split: the split, such as ``"train"`` or ``"test[:100]"``.
        streaming: read it as it is used, instead of fetching all of it first.

    Returns:
        ``datasets.Dataset``, or ``datasets.IterableDataset`` when streaming, whose records are dictionaries.

    Raises:
        ImportError: datasets is not installed.
        FileNotFoundError: there is no such data set.
        ValueError: a column, the configuration or the split does not exist.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("this data set comes through datasets: pip install lossbook[full]") from error
    dataset = load_dataset(str(name), config, split=split, streaming=streaming)
    if missing := [column for column in columns if column not in (dataset.column_names or columns)]:
        raise ValueError(f"columns must be among {', '.join(dataset.column_names)}, got {', '.join(missing)}")
    return dataset.select_columns(list(columns))
