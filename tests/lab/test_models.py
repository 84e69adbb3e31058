import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossbook import lab


def kinds(model):
    return [type(layer).__name__ for layer in model.layers]


def test_mlp_expresses_the_first_labs_encoder_and_head():
    encoder = lab.MLP((64, 256, 128), batch_norm=True, final_activation=True)
    head = lab.MLP((128, 128, 64))
    assert kinds(encoder) == ["Linear", "BatchNorm1d", "ReLU"] * 2
    assert kinds(head) == ["Linear", "ReLU", "Linear"]
    features = encoder(torch.rand(16, 1, 8, 8))
    assert features.shape == (16, 128) and features.min() >= 0
    assert head(features).shape == (16, 64)


def test_mlp_is_its_formula():
    model = lab.MLP((6, 5, 2)).double()
    inputs = torch.randn(4, 2, 3, dtype=torch.float64)
    first, _, second = model.layers
    expected = (inputs.flatten(1) @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(model(inputs), expected)


def test_mlp_bad_input_is_named():
    with pytest.raises(ValueError, match="sizes"):
        lab.MLP((3,))
    with pytest.raises(ValueError, match=r"inputs must flatten to \(N, 64\)"):
        lab.MLP((64, 10))(torch.rand(5, 1, 9, 9))


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (2, 4)])
def test_convnet_shapes(channels, side):
    model = lab.ConvNet(channels, 7, width=4)
    assert model(torch.rand(5, channels, side, side)).shape == (5, 7)


def test_resnet_is_torchvisions_resnet18_with_a_small_stem(torchvision):
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    ours = lab.ResNet()
    weights = reference.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images))


def test_resnet_features_and_outputs():
    features = lab.ResNet(1, None, width=4, blocks=(1, 1, 1))
    assert features(torch.rand(5, 1, 8, 8)).shape == (5, 16) and features.num_features == 16
    assert lab.ResNet(1, 3, width=4, blocks=(1, 1))(torch.rand(5, 1, 8, 8)).shape == (5, 3)
    with pytest.raises(ValueError, match="blocks"):
        lab.ResNet(blocks=(2, 0))


@pytest.mark.parametrize(
    "make",
    [lambda: lab.MLP((64, 32, 4)), lambda: lab.ConvNet(1, 4, 8), lambda: lab.ResNet(1, 4, width=8, blocks=(1, 1))],
    ids=["MLP", "ConvNet", "ResNet"],
)
def test_image_models_learn_to_tell_four_digits(make):
    model = make()
    digits = lab.load_digits()
    chosen = (digits.labels < 4).nonzero().squeeze(1)[:128]
    images, labels = digits.images[chosen], digits.labels[chosen]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


def small_transformer():
    torch.manual_seed(0)
    return lab.Transformer(17, dim=16, depth=2, heads=2, context=12).double()


@given(st.integers(1, 12), st.data())
@settings(max_examples=25, deadline=None)
def test_a_later_token_does_not_change_earlier_logits(length, data):
    changed = data.draw(st.integers(0, length - 1))
    tokens = torch.tensor([data.draw(st.lists(st.integers(0, 16), min_size=length, max_size=length))])
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + data.draw(st.integers(1, 16))) % 17
    model = small_transformer()
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=1e-12)
    assert (before[:, changed:] - after[:, changed:]).abs().amax(-1).min() > 1e-9


def test_transformer_ties_its_output_weight():
    model = small_transformer()
    tokens = torch.randint(17, (3, 5))
    hidden = model.hidden(tokens)
    assert hidden.shape == (3, 5, 16)
    torch.testing.assert_close(model(tokens), hidden @ model.output_weight.T)
    assert model.output_weight is model.embedding.weight
    assert sum(p.numel() for p in model.parameters() if p.shape == (17, 16)) == 17 * 16


def test_transformer_knows_positions():
    model = small_transformer()
    logits = model(torch.full((1, 6), 3))
    assert torch.pdist(logits[0]).min() > 1e-6


def test_transformer_learns_a_cycle():
    model = lab.Transformer(5, dim=16, depth=1, heads=2, context=10)
    sequence = torch.arange(11).remainder(5).unsqueeze(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(sequence[:, :-1]).flatten(0, 1), sequence[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_transformer_bad_input_is_named():
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        lab.Transformer(5, dim=10, heads=4)
    for shape in ((2, 13), (12,)):
        with pytest.raises(ValueError, match=r"tokens must be \(B, T\) with T <= 12"):
            small_transformer()(torch.zeros(shape, dtype=torch.int64))
