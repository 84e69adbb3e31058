"""The few models that the labs share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    ``MLP((64, 256, 128), batch_norm=True, final_activation=True)`` followed by ``MLP((128, 128, 64))`` is an encoder
    with batch norm and a projection head without.

    Args:
        sizes: widths from input to output, at least two.
        batch_norm: batch norm before each ReLU.
        final_activation: batch norm (where asked for) and ReLU after the last layer, too.

    Input ``(N, ...)``, flattened to ``(N, sizes[0])``; output ``(N, sizes[-1])``.

    Raises:
        ValueError: fewer than two sizes; on call, an input that does not flatten to ``sizes[0]``.

    Example:
        >>> MLP((64, 32, 10))(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int], *, batch_norm: bool = False, final_activation: bool = False):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output width, got {tuple(sizes)}")
        self.num_inputs = sizes[0]
        self.layers = nn.Sequential()
        for index, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
            self.layers.append(nn.Linear(fan_in, fan_out))
            if index < len(sizes) - 1 or final_activation:
                if batch_norm:
                    self.layers.append(nn.BatchNorm1d(fan_out))
                self.layers.append(nn.ReLU())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        if flat.shape[1] != self.num_inputs:
            raise ValueError(f"inputs must flatten to (N, {self.num_inputs}), got shape {tuple(inputs.shape)}")
        return self.layers(flat)


class ConvNet(nn.Module):
    """Three 3 x 3 convolutions with batch norm and ReLU, two poolings, a mean over positions, and a linear layer.

    Args:
        in_channels: channels of the image.
        num_outputs: width of the output.
        width: channels of the first convolution; the other two have twice as many.

    Input ``(N, in_channels, H, W)`` with H, W >= 4; output ``(N, num_outputs)``.

    Example:
        >>> ConvNet(1, 10)(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, in_channels: int, num_outputs: int, width: int = 32):
        super().__init__()

        def convolution(fan_in: int, fan_out: int) -> list[nn.Module]:
            return [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]

        self.layers = nn.Sequential(
            *convolution(in_channels, width),
            nn.MaxPool2d(2),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *convolution(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, num_outputs),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class _Block(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut.append(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(fan_out))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(residual)) + self.shortcut(images))


class ResNet(nn.Module):
    """Residual network for small images: a 3 x 3 stem without pooling, then stages of basic blocks. Default: ResNet-18.

    Args:
        in_channels: channels of the image.
        num_outputs: width of the last layer; ``None`` leaves it out and returns the pooled features.
        width: channels of the first stage; each later stage doubles them and halves the image.
        blocks: blocks per stage.

    Input ``(N, in_channels, H, W)``; output ``(N, num_outputs)``, or without the last layer ``(N, num_features)``,
    where ``num_features = width * 2 ** (len(blocks) - 1)``.

    Raises:
        ValueError: ``blocks`` is empty or holds a number below one.

    Example:
        >>> ResNet(3, None, width=8, blocks=(1, 1))(torch.rand(5, 3, 16, 16)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_outputs: int | None = 10,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
    ):
        super().__init__()
        if not blocks or min(blocks) < 1:
            raise ValueError(f"blocks must hold a positive number per stage, got {tuple(blocks)}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential()
        fan_in = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                fan_out = width * 2**stage
                self.stages.append(_Block(fan_in, fan_out, stride=2 if stage and not index else 1))
                fan_in = fan_out
        self.num_features = fan_in
        self.head = nn.Identity() if num_outputs is None else nn.Linear(fan_in, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


class _DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        joint = self.query_key_value(self.norm1(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = joint.permute(2, 0, 3, 1, 4)  # each (B, heads, T, dim / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(mixed.transpose(1, 2).flatten(2))
        return hidden + self.feed_forward(self.norm2(hidden))


class Transformer(nn.Module):
    """Decoder-only transformer: causal, pre-norm, learned positions, output weight tied to the token embedding.

    Args:
        vocab_size: number of tokens V.
        dim: width, a multiple of ``heads``.
        depth: number of layers.
        heads: attention heads per layer.
        context: longest sequence.

    Input int64 ``(B, T)`` with T <= ``context``; output logits ``(B, T, V)``, where position t has seen tokens 0 to t.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; on call, tokens that are not ``(B, T)`` or too long.

    Example:
        >>> model = Transformer(50, dim=16, depth=1, heads=2, context=8)
        >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 50])
    """

    def __init__(self, vocab_size: int, dim: int = 128, depth: int = 4, heads: int = 4, context: int = 256):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.context = context
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(context, dim)
        self.layers = nn.Sequential(*(_DecoderLayer(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the normalized states ``(B, T, dim)``; times ``output_weight.T`` they are the logits."""
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(f"tokens must be (B, T) with T <= {self.context}, got shape {tuple(tokens.shape)}")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.layers(self.embedding(tokens) + self.position(positions)))

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer ``(V, dim)``, one row a token: here the token embedding itself."""
        return self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.hidden(tokens), self.output_weight)
