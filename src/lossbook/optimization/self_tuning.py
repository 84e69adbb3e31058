r"""Self-tuning networks: hyperparameters that are learned in the one run that trains the weights.

The method of *Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions* (MacKay, Vicol, Lorraine, Duvenaud
and Grosse, ICLR 2019, arXiv 1903.03088): layers whose weights are an affine function of the hyperparameters, hyperparameters that are perturbed for each
example, the regularizers that read them, the alternating training, and the exact cases against which it is checked. Equation labels are those of the
chapter ``optimization/self_tuning``.

Notation: ``h`` is :math:`\lambda`, the n *unconstrained* hyperparameters, shape ``(n,)``, or ``(B, n)`` with one row for each example; ``rates`` are the
constrained ones :math:`r(\lambda)`. :math:`\phi` are all parameters of the best-response layers, and ``scale`` is :math:`\sigma`, the standard deviation
of the perturbation, kept as ``raw_scale`` :math:`s` with :math:`\sigma=\operatorname{softplus}(s)`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossbook import _checks

# ---------------------------------------------------------------------------------------------------------------------
# Best-response layers
# ---------------------------------------------------------------------------------------------------------------------


def _response_input(h: Tensor, x: Tensor, num_hparams: int, dtype: torch.dtype) -> Tensor:
    """``h``, if it is one row of ``num_hparams`` numbers, or one for each of the examples in ``x``."""
    _checks.floating("h", h)
    if h.ndim not in (1, 2) or h.shape[-1] != num_hparams or (h.ndim == 2 and (x.ndim < 2 or len(h) != len(x))):
        raise ValueError(
            f"h must have shape ({num_hparams},), or (B, {num_hparams}) with the batch size of x, got {tuple(h.shape)} for x of {tuple(x.shape)}"
        )
    if h.dtype != dtype:
        raise TypeError(f"h must have the dtype of the layer, {dtype}, got {h.dtype}")
    return h


class _BestResponse(nn.Module):
    """What the two layers share: six parameters, their start values, and the effective weight."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_hparams: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        self.num_hparams = _checks.positive_int("num_hparams", num_hparams)
        new = lambda *sizes: nn.Parameter(torch.empty(*sizes, device=device, dtype=dtype))
        self.weight, self.hyper_weight, self.weight_gate = new(*shape), new(*shape), new(shape[0], num_hparams)
        for name in ("bias", "hyper_bias"):
            self.register_parameter(name, new(shape[0]) if bias else None)
        self.register_parameter("bias_gate", new(shape[0], num_hparams) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values: weights and biases, elementary and hyper, as PyTorch's layers do; gates from N(0, 0.01²)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in (self.weight, self.bias, self.hyper_weight, self.hyper_bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        for gate in (self.weight_gate, self.bias_gate):
            if gate is not None:
                nn.init.normal_(gate, std=0.01)  # not 0: then hyper_weight would get no gradient at first

    @staticmethod
    def _gate(h: Tensor, weight: Tensor) -> Tensor:
        """V h for each row of ``h``; never in half precision, where a hyperparameter loses its perturbation."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h, weight)

    def _gates(self, h: Tensor, x: Tensor, trailing: int) -> tuple[Tensor, Tensor | float]:
        """The gates of the outputs and the change of the bias, ready to multiply and add to outputs with ``trailing`` dimensions after the unit's."""
        _response_input(h, x, self.num_hparams, self.weight.dtype)
        gate = self._gate(h, self.weight_gate)
        shift = None if self.bias is None else self._gate(h, self.bias_gate) * self.hyper_bias
        between = 0 if h.ndim == 1 else x.ndim - 2 - trailing  # dimensions of x between example and unit
        place = lambda value: value.reshape(*value.shape[:-1], *(1,) * between, -1, *(1,) * trailing)
        return place(gate), 0.0 if shift is None else place(shift)

    def effective_weight(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        r"""The weight :math:`\hat W_\phi(\lambda)` and bias :math:`\hat b_\phi(\lambda)` for one ``h`` (eq-self_tuning-layer), formed.

        Args:
            h: shape ``(n,)``, the dtype of the layer; differentiable.

        Returns:
            The weight in the shape of ``weight``, and the bias ``(out,)`` or None.

        Raises:
            TypeError, ValueError: for another shape or dtype.
        """
        if _checks.floating("h", h).shape != (self.num_hparams,):
            raise ValueError(f"h must have shape ({self.num_hparams},), got {tuple(h.shape)}")
        gate = self._gate(h, self.weight_gate).reshape(-1, *(1,) * (self.weight.ndim - 1))
        weight = self.weight + gate * self.hyper_weight
        return weight, None if self.bias is None else self.bias + self._gate(h, self.bias_gate) * self.hyper_bias

    def squared_norm(self, h: Tensor) -> Tensor:
        r"""The squared Frobenius norm of :math:`\hat W_\phi(\lambda)`, for a weight decay of each example (eq-self_tuning-norm), without forming it.

        :math:`\|\hat W\|^2=\sum_r\|W_r\|^2+2g_rW_r\cdot H_r+g_r^2\|H_r\|^2` over units r, with the gates :math:`g=V\lambda`.

        Args:
            h: ``(n,)`` or ``(B, n)``, the dtype of the layer; differentiable.

        Returns:
            Shape ``()`` or ``(B,)``, without the bias.

        Raises:
            TypeError, ValueError: for another shape or dtype.

        Complexity: O(weights + B out n) time, O(B out) memory.
        """
        _response_input(h, h, self.num_hparams, self.weight.dtype)
        elementary, hyper = self.weight.flatten(1), self.hyper_weight.flatten(1)
        gate = self._gate(h, self.weight_gate)
        cross, square = (elementary * hyper).sum(1), hyper.square().sum(1)
        return elementary.square().sum() + (gate * (2 * cross + gate * square)).sum(-1)


class BestResponseLinear(_BestResponse):
    r"""A linear layer whose weights respond to hyperparameters by gating its units (eq-self_tuning-layer).

    :math:`\hat W_\phi(\lambda)=W+(V\lambda)\odot_{\rm row}H` and :math:`\hat b_\phi(\lambda)=b+(C\lambda)\odot c`, evaluated without forming them:
    :math:`\hat Wx+\hat b=(Wx+b)+(V\lambda)\odot(Hx)+(C\lambda)\odot c`.

    The parameters are ``weight`` W and ``bias`` b, which have the names of ``nn.Linear``'s, ``hyper_weight`` H and ``hyper_bias`` c, and the gates
    ``weight_gate`` V and ``bias_gate`` C. In all :math:`D_{out}(2D_{in}+n)+D_{out}(2+n)` numbers.

    Args:
        in_features, out_features: :math:`D_{in}` and :math:`D_{out}`.
        num_hparams: n.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for a wrong size.

    Complexity: two matrix products where ``nn.Linear`` has one, and O(B out n) for the gates; ``h`` may differ for each example at no further cost.

    Source: MacKay et al., the structured best-response.

    Example:
        >>> layer = BestResponseLinear(1, 1, 1)
        >>> for parameter, value in zip(layer.parameters(), (2.0, 3.0, 0.5, 0.0, 1.0, -1.0)):  # W, H, V, b, c, C
        ...     _ = nn.init.constant_(parameter, value)
        >>> layer(torch.ones(1, 1), torch.tensor([[2.0]])).item()  # 2 + 1 * 3 - 2 * 1
        3.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_hparams: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self_in = _checks.positive_int("in_features", in_features)
        shape = (_checks.positive_int("out_features", out_features), self_in)
        super().__init__(shape, num_hparams, bias, device, dtype)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        r"""The output.

        Args:
            x: ``(B, ..., in_features)``.
            h: ``(B, n)``, ``(n,)`` for one that all examples share, or None for the elementary path only.

        Returns:
            ``(B, ..., out_features)``.

        Raises:
            TypeError, ValueError: for an ``h`` of another shape or dtype.
        """
        output = F.linear(x, self.weight, self.bias)
        if h is None:
            return output
        gate, shift = self._gates(h, x, trailing=0)
        return (output + gate * F.linear(x, self.hyper_weight) + shift).to(output.dtype)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, num_hparams={self.num_hparams}, bias={self.bias is not None}"


class BestResponseConv2d(_BestResponse):
    r"""A convolution whose weights respond to hyperparameters by gating its output channels (eq-self_tuning-layer).

    As :class:`BestResponseLinear`, with one gate for each output channel: :math:`C_{out}(2C_{in}k^2+n)+C_{out}(2+n)` numbers.

    Args:
        in_channels, out_channels: :math:`C_{in}` and :math:`C_{out}`.
        kernel_size: k, the side of the square kernel.
        num_hparams: n.
        stride, padding, dilation, groups, bias: as those of ``nn.Conv2d``, with numbers for both sides.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for a wrong size.

    Complexity: two convolutions where ``nn.Conv2d`` has one, and O(B out n) for the gates.

    Source: MacKay et al., the structured best-response for convolutions.

    Example:
        >>> layer = BestResponseConv2d(3, 8, 3, num_hparams=2, padding=1)
        >>> layer(torch.rand(5, 3, 7, 7), torch.zeros(5, 2)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([5, 8, 7, 7]), 480)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_hparams: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("kernel_size", kernel_size)):
            _checks.positive_int(name, value)
        for name, value in (("stride", stride), ("dilation", dilation), ("groups", groups)):
            _checks.positive_int(name, value)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels and out_channels, {in_channels} and {out_channels}, got {groups}"
            )
        super().__init__(
            (out_channels, in_channels // groups, kernel_size, kernel_size), num_hparams, bias, device, dtype
        )
        self.options = {"stride": stride, "padding": _checks.positive_int("padding", padding, minimum=0)}
        self.options |= {"dilation": dilation, "groups": groups}

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        r"""The output.

        Args:
            x: ``(B, in_channels, H, W)``.
            h: ``(B, n)``, ``(n,)`` for one that all examples share, or None for the elementary path only.

        Returns:
            ``(B, out_channels, H', W')``.

        Raises:
            TypeError, ValueError: for an ``h`` of another shape or dtype, or an ``x`` without four dimensions.
        """
        if x.ndim != 4:
            raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
        output = F.conv2d(x, self.weight, self.bias, **self.options)
        if h is None:
            return output
        gate, shift = self._gates(h, x, trailing=2)
        return (output + gate * F.conv2d(x, self.hyper_weight, **self.options) + shift).to(output.dtype)

    def extra_repr(self) -> str:
        out_channels, in_channels, size, _ = self.weight.shape
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"{in_channels * self.options['groups']}, {out_channels}, {size}, num_hparams={self.num_hparams}, {options}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------------------------------------------------


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to the last digit: torch's own is linear above 20."""
    return torch.logaddexp(x, x.new_zeros(()))


def softplus_inverse(y: Tensor) -> Tensor:
    r"""The x with :math:`\operatorname{softplus}(x)=\log(1+e^x)=y`, as :math:`y+\log(1-e^{-y})`.

    Args:
        y: any shape, floating point, > 0; differentiable.

    Returns:
        The shape of ``y``, finite for every finite y > 0.

    Raises:
        TypeError, ValueError: for a wrong type or value.

    Source: MacKay et al., the parametrization of scales and penalties.

    Example:
        >>> softplus_inverse(torch.tensor([0.5, 50.0]))
        tensor([-0.4328, 50.0000])
    """
    if _checks.known_false(_checks.floating("y", y) > 0):
        raise ValueError(f"y must be > 0 everywhere, got {y.min()}")
    return y + torch.log(-torch.expm1(-y))


def _interval(low: float, high: float) -> tuple[float, float]:
    """Two bounds, either of which may be infinite."""
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low < high or low == math.inf or high == -math.inf:
        raise ValueError(f"low must be less than high, got {low} and {high}")
    return float(low), float(high)


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    r"""Constrain numbers to an interval (eq-self_tuning-maps).

    :math:`a+(b-a)\sigma(x)` for (a, b), :math:`a+\operatorname{softplus}(x)` for (a, ∞), :math:`b-\operatorname{softplus}(x)` for (-∞, b), which falls
    in x as in the paper's code, and x itself for (-∞, ∞). Rounding may return a bound itself.

    Args:
        x: any shape, floating point; differentiable.
        low, high: a < b; they may be infinite.

    Returns:
        The shape of ``x``.

    Raises:
        TypeError, ValueError: for a wrong type or value.

    Source: MacKay et al., the parametrization of hyperparameters.

    Example:
        >>> bounded(torch.tensor([0.0, 2.0]), 0, 0.9)
        tensor([0.4500, 0.7927])
    """
    low, high = _interval(low, high)
    _checks.floating("x", x)
    if low == -math.inf:
        return x if high == math.inf else high - _softplus(x)
    return low + (_softplus(x) if high == math.inf else (high - low) * torch.sigmoid(x))


def unbounded(r: Tensor, low: float, high: float) -> Tensor:
    r"""The inverse of :func:`bounded` (eq-self_tuning-maps).

    Args:
        r: any shape, floating point, strictly between the bounds; differentiable.
        low, high: as in :func:`bounded`.

    Returns:
        The shape of ``r``.

    Raises:
        TypeError, ValueError: for a wrong type or value.

    Source: MacKay et al., the parametrization of hyperparameters.

    Example:
        >>> unbounded(torch.tensor([0.45, 0.05]), 0, 0.9)
        tensor([ 0.0000, -2.8332])
    """
    low, high = _interval(low, high)
    if _checks.known_false((_checks.floating("r", r) > low) & (r < high)):
        raise ValueError(f"r must lie strictly between {low:g} and {high:g}, got {r.min():g} to {r.max():g}")
    if low == -math.inf:
        return r if high == math.inf else softplus_inverse(high - r)
    return softplus_inverse(r - low) if high == math.inf else (r - low).log() - (high - r).log()


@dataclass(frozen=True)
class HyperparameterSpec:
    r"""One hyperparameter: its range, its start, and how it is perturbed.

    Args:
        name: what losses find it by.
        low, high: the open interval of its values; either may be infinite.
        init: where it starts, ``low < init < high``.
        discrete: take the floor of the value: the whole numbers from the floor of ``low`` to the last one below ``high``. For (0, 24) these are 0 to 23.
            ``init`` is the value *before* the floor: 4.5 starts in the middle of 4.
        per_example: perturb it for each example of a batch; False for one that acts on weights that the batch shares.
        scale: the first :math:`\sigma` > 0, in the unit of the unconstrained hyperparameter.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: MacKay et al., the parametrization of hyperparameters; ranges of their experiments in the chapter.

    Example:
        >>> HyperparameterSpec("dropout", 0, 0.9, init=0.05).scale
        0.5
    """

    name: str
    low: float
    high: float
    init: float
    discrete: bool = False
    per_example: bool = True
    scale: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a string that is not empty, got {self.name!r}")
        low, high = _interval(self.low, self.high)
        if not low < _checks.number("init", self.init) < high:
            raise ValueError(f"init of {self.name} must lie strictly between {low:g} and {high:g}, got {self.init}")
        _checks.positive_number("scale", self.scale)

    def constrain(self, x: Tensor) -> Tensor:
        """The value at the unconstrained ``x``, any shape; floored if discrete, and then without a gradient."""
        value = bounded(x, self.low, self.high)
        if not self.discrete:
            return value
        # Rounding may return the upper bound, which the open interval does not hold.
        return value.floor().clamp(max=math.ceil(self.high) - 1) if self.high < math.inf else value.floor()


class HyperparameterSet(nn.Module):
    r"""The hyperparameters of a run: their unconstrained values :math:`\lambda` and the scales :math:`\sigma` of their perturbation.

    Two parameters, ``unconstrained`` and ``raw_scale``, both ``(n,)``: move them to a device, save them, and give them to optimizers as any other.

    Args:
        specs: at least one, with different names.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for an empty list, a name that comes twice, or something else than specs.

    Source: MacKay et al., the algorithm; scales by softplus.

    Example:
        >>> hparams = HyperparameterSet([HyperparameterSpec("dropout", 0, 0.9, 0.05), HyperparameterSpec("holes", 0, 4, 1.5, discrete=True)])
        >>> {name: round(value, 4) for name, value in hparams.values().items()}
        {'dropout': 0.05, 'holes': 1.0}
        >>> hparams.perturb(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        specs: Sequence[HyperparameterSpec],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.specs = tuple(specs)
        if not self.specs:
            raise ValueError("specs must hold at least one hyperparameter, got none")
        for spec in self.specs:
            if not isinstance(spec, HyperparameterSpec):
                raise TypeError(f"specs must hold HyperparameterSpec, got {type(spec).__name__}")
        if len({spec.name for spec in self.specs}) < len(self.specs):
            raise ValueError(f"specs must have different names, got {[spec.name for spec in self.specs]}")
        double = lambda value: torch.tensor(value, dtype=torch.float64)
        start = torch.stack([unbounded(double(float(s.init)), s.low, s.high) for s in self.specs])
        raw = softplus_inverse(double([float(s.scale) for s in self.specs]))
        kind = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.unconstrained, self.raw_scale = nn.Parameter(start.to(**kind)), nn.Parameter(raw.to(**kind))
        shared = torch.tensor([not spec.per_example for spec in self.specs], device=device)
        self.register_buffer("_shared", shared, persistent=False)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def scale(self) -> Tensor:
        r""":math:`\sigma=\operatorname{softplus}(s)`, shape ``(n,)``; differentiable."""
        return _softplus(self.raw_scale)

    def perturb(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        r""":math:`\lambda+\epsilon_i`, :math:`\epsilon_i\sim\mathcal N(0,\operatorname{diag}\sigma^2)`, for each example (eq-self_tuning-perturbation).

        Args:
            batch_size: B.
            generator: on the parameters' device.

        Returns:
            Shape ``(B, n)``; differentiable in both parameters. A column whose spec says ``per_example=False`` is constant.

        Raises:
            TypeError, ValueError: for a wrong batch size.
        """
        size = (_checks.positive_int("batch_size", batch_size), len(self))
        like = self.unconstrained
        noise = torch.randn(size, generator=generator, device=like.device, dtype=like.dtype)
        return like + self.scale * torch.where(self._shared, noise[:1], noise)

    def constrain(self, h: Tensor) -> dict[str, Tensor]:
        """The values :math:`r(\\lambda)` by name.

        Args:
            h: ``(..., n)``, floating point; differentiable.

        Returns:
            For each name a tensor of the shape ``(...)``. Discrete ones are floored, and have no gradient.

        Raises:
            TypeError, ValueError: for another width.
        """
        if _checks.floating("h", h).ndim == 0 or h.shape[-1] != len(self):
            raise ValueError(f"h must have {len(self)} columns, got shape {tuple(h.shape)}")
        return {spec.name: spec.constrain(column) for spec, column in zip(self.specs, h.unbind(-1), strict=True)}

    def values(self) -> dict[str, float]:
        """The current values by name, without perturbation."""
        return {name: value.item() for name, value in self.constrain(self.unconstrained.detach()).items()}

    def entropy(self) -> Tensor:
        r"""The entropy of the perturbation, :math:`\sum_k\log(\sigma_k\sqrt{2\pi e})` (eq-self_tuning-entropy); shape ``()``, differentiable."""
        raw = self.raw_scale
        # For small scales log(softplus(s)) = s - e^s / 2 to the last digit, where softplus(s) itself may underflow.
        small = raw < -20
        log_scale = torch.where(small, raw - raw.clamp(max=0).exp() / 2, _softplus(raw.masked_fill(small, 0.0)).log())
        return log_scale.sum() + len(self) * 0.5 * math.log(2 * math.pi * math.e)

    def extra_repr(self) -> str:
        return ", ".join(spec.name for spec in self.specs)


# ---------------------------------------------------------------------------------------------------------------------
# Regularizers with one strength for each example
# ---------------------------------------------------------------------------------------------------------------------


def _strength(name: str, value: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``value`` without its gradient, shaped to multiply ``x``, if it is one number or one for each example, in [low, high]."""
    _checks.floating(name, value)
    if not x.ndim:
        raise ValueError("x must have a dimension of examples, got a tensor without one")
    if value.shape not in ((), (len(x),)):
        raise ValueError(f"{name} must have shape () or ({len(x)},), one for each example, got {tuple(value.shape)}")
    value = value.detach()
    if _checks.known_false((value >= low) & (value <= high)):
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value.min():g} to {value.max():g}")
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def _drawn_shape(x: Tensor, shared_dims: int) -> tuple[int, ...]:
    """The shape of random numbers for ``x`` that its last ``shared_dims`` dimensions share."""
    if _checks.positive_int("shared_dims", shared_dims, minimum=0) > x.ndim - 1:
        raise ValueError(f"shared_dims must be at most {x.ndim - 1} for x of shape {tuple(x.shape)}, got {shared_dims}")
    return (*x.shape[: x.ndim - shared_dims], *(1,) * shared_dims)


def dropout_per_example(
    x: Tensor, rates: Tensor, training: bool = True, *, shared_dims: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Dropout with a rate for each example (eq-self_tuning-dropout): :math:`x_{ij}m_{ij}/(1-r_i)`, where :math:`m_{ij}` is 1 with probability :math:`1-r_i`, else 0.

    Args:
        x: ``(B, ...)``, floating point; differentiable.
        rates: ``(B,)`` or ``()``, in [0, 1]; no gradient reaches them. At 1 all is zero.
        training: if false, ``x`` is returned.
        shared_dims: how many of the last dimensions share a mask: 2 drops whole channels of ``(B, C, H, W)``.
        generator: on the device of ``x``.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(size of x).

    Source: MacKay et al., hyperparameters per example.

    Example:
        >>> x = torch.ones(2, 4)
        >>> dropout_per_example(x, torch.tensor([0.0, 0.5]), generator=torch.Generator().manual_seed(0))
        tensor([[1., 1., 1., 1.],
                [0., 2., 0., 2.]])
    """
    rates = _strength("rates", rates, _checks.floating("x", x), 0, 1)
    shape = _drawn_shape(x, shared_dims)
    if not training:
        return x
    kept = torch.rand(shape, generator=generator, device=x.device) >= rates
    return x * torch.where(kept, 1 / (1 - rates), 0.0).to(x.dtype)


def noise_per_example(
    x: Tensor,
    scales: Tensor,
    training: bool = True,
    *,
    multiplicative: bool = False,
    shared_dims: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Gaussian noise with a scale for each example (eq-self_tuning-noise): :math:`x_{ij}+r_iz_{ij}`, or :math:`x_{ij}(1+r_iz_{ij})`, with standard normal z.

    Args:
        x: ``(B, ...)``, floating point; differentiable.
        scales: ``(B,)`` or ``()``, >= 0; no gradient reaches them.
        training: if false, ``x`` is returned.
        multiplicative: scale the values instead of adding to them.
        shared_dims: how many of the last dimensions share a draw: with all of them, one factor scales a whole example.
        generator: on the device of ``x``.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(size of x).

    Source: MacKay et al., hyperparameters per example.

    Example:
        >>> noise_per_example(torch.ones(2, 3), torch.tensor([0.0, 0.1]), generator=torch.Generator().manual_seed(0))[0]
        tensor([1., 1., 1.])
    """
    scales = _strength("scales", scales, _checks.floating("x", x), 0, math.inf)
    shape = _drawn_shape(x, shared_dims)
    if not training:
        return x
    noise = (scales * torch.randn(shape, generator=generator, device=x.device)).to(x.dtype)
    return x * (1 + noise) if multiplicative else x + noise


def cutout_per_example(
    images: Tensor,
    lengths: Tensor,
    holes: Tensor | None = None,
    training: bool = True,
    *,
    max_holes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Set squares of each image to zero, their side and their number one for each example. Both are discrete hyperparameters.

    A square's center is a pixel, uniform over the image, so that part of a square may lie outside of it.

    Args:
        images: ``(B, C, H, W)``, floating point; differentiable.
        lengths: the side in pixels, ``(B,)`` or ``()``, >= 0, floored; no gradient reaches it.
        holes: the number of squares, ``(B,)`` or ``()``, 0 to ``max_holes``, floored; None for one.
        training: if false, the images are returned.
        max_holes: most squares in an image, so that nothing waits for the device.
        generator: on the device of the images.

    Returns:
        The shape and dtype of ``images``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(B max_holes H W) time and bits of memory.

    Source: MacKay et al., the hyperparameters of the convolutional network.

    Example:
        >>> images = cutout_per_example(torch.ones(1, 1, 9, 9), torch.tensor([1.0]))
        >>> images.sum().item()
        80.0
    """
    count, _, height, width = _checks.floating("images", images, 4).shape
    _checks.positive_int("max_holes", max_holes)
    lengths = _strength("lengths", lengths, images, 0, math.inf).floor()
    holes = _strength("holes", images.new_ones(()) if holes is None else holes, images, 0, max_holes).floor()
    if not training:
        return images
    draws = torch.rand(2, count, max_holes, generator=generator, device=images.device)

    def inside(draw: Tensor, extent: int) -> Tensor:
        """Which of the ``extent`` rows or columns each square covers, shape (B, max_holes, extent)."""
        first = (draw * extent).floor() - (lengths / 2).floor().reshape(-1, 1)
        offset = torch.arange(extent, device=images.device) - first[..., None]
        return (offset >= 0) & (offset < lengths.reshape(-1, 1, 1))

    active = torch.arange(max_holes, device=images.device) < holes.reshape(-1, 1)
    rows, columns = inside(draws[0], height) & active[..., None], inside(draws[1], width)
    covered = (rows[..., :, None] & columns[..., None, :]).any(1, keepdim=True)
    return images.masked_fill(covered, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def _first_length(batch: Any) -> int:
    """The number of examples: the length of the first tensor of a batch."""
    first = batch
    while not isinstance(first, Tensor):
        if not isinstance(first, Mapping | Sequence) or isinstance(first, str) or not first:
            raise TypeError(
                f"batch_size must be given for batches without a tensor in front, got {type(batch).__name__}"
            )
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return len(first)


def _drawn(name: str, batches: Iterable[Any], count: int) -> list[Any]:
    """``count`` batches: all of a sequence, or the next ones of an iterator."""
    if isinstance(batches, Sized) and not isinstance(batches, Iterator) and len(batches) != count:
        raise ValueError(f"{name} must hold {count} batches, or be an iterator, got {len(batches)}")
    drawn = list(islice(iter(batches), count))
    if len(drawn) < count:
        raise ValueError(f"{name} must give {count} batches, it ended after {len(drawn)}")
    return drawn


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class STNTrainer:
    r"""The alternation of a self-tuning network (alg-self_tuning): fit the response on training batches, move the hyperparameters on validation batches.

    Phase A, ``train_steps`` times: draw :math:`\lambda+\epsilon_i`, and update :math:`\phi` on the training loss that these regularize
    (eq-self_tuning-local). Phase B, ``valid_steps`` times: update :math:`\lambda`, and :math:`\sigma` if it is tuned, on the validation loss through the
    response, less ``entropy_weight`` times the entropy (eq-self_tuning-entropy-objective). With a fixed :math:`\sigma` phase B does not perturb. Each phase
    leaves the parameters of the other alone: in A the losses get an ``h`` without gradient, in B only the gradients of :math:`\lambda` and :math:`\sigma`
    are computed. The model is in training mode in A, in evaluation mode in B, and afterwards in the mode in which it was found.

    Losses may compute under ``torch.autocast`` with bfloat16, and the model may be compiled.

    Args:
        model: a network with best-response layers; its parameters are :math:`\phi`.
        hparams: the hyperparameters.
        train_loss: ``train_loss(model, batch, h, rates)``, a scalar: the mean over the batch of the regularized loss.
        valid_loss: ``valid_loss(model, batch, h)``, a scalar: the mean of the loss that is wanted. It must depend on ``h``.
        opt_w: optimizer of the model's parameters; none of ``hparams``'s may be in it.
        opt_h: optimizer of ``hparams.unconstrained``, and of nothing else.
        opt_s: optimizer of ``hparams.raw_scale``, and of nothing else; None if ``tune_scale`` is false.
        train_steps, valid_steps: updates in phases A and B.
        entropy_weight: :math:`\tau` >= 0. The paper uses 1e-5 to 1e-3.
        tune_scale: whether :math:`\sigma` is learned.
        warmup: calls of :meth:`step` without phase B at the start.
        max_grad_norm: clip the gradient of :math:`\phi` to this norm; None for no clipping.
        batch_size: how many perturbations a batch needs: a function of the batch, a number, or None for the length of its first tensor.
        generator: of the perturbations, on the device of ``hparams``.

    Attributes:
        steps: calls of :meth:`step` so far.
        history: lists of detached tensors ``(n,)``, ``unconstrained`` and ``scale``, as they were in phase A of each step.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Complexity: of one :meth:`step`, ``train_steps`` forward and backward passes on training batches and ``valid_steps`` on validation batches, each about
    twice that of a plain network; ``history`` keeps 2n numbers for each step.

    Source: MacKay et al., the algorithm.

    Example:
        >>> _ = torch.manual_seed(2)
        >>> X = torch.randn(100, 20)
        >>> t = X[:, 0] + 2 * torch.randn(100)
        >>> model = BestResponseLinear(20, 1, num_hparams=1)
        >>> hparams = HyperparameterSet([HyperparameterSpec("penalty", 0, 2, init=0.05)])
        >>> squared = lambda model, batch, h: (model(batch[0], h)[:, 0] - batch[1]).square().mean()
        >>> trainer = STNTrainer(
        ...     model, hparams,
        ...     lambda model, batch, h, rates: squared(model, batch, h) + (rates["penalty"] * model.squared_norm(h)).mean(),
        ...     squared, tune_scale=False, warmup=50,
        ...     opt_w=torch.optim.SGD(model.parameters(), 0.05), opt_h=torch.optim.Adam([hparams.unconstrained], 0.05),
        ... )
        >>> for _ in range(300):
        ...     result = trainer.step([(X[:30], t[:30])] * 2, [(X[30:], t[30:])])
        >>> 0.2 < hparams.values()["penalty"] < 1.2  # thirty noisy targets, twenty weights: the best is about 0.6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: HyperparameterSet,
        train_loss: Callable[[nn.Module, Any, Tensor, dict[str, Tensor]], Tensor],
        valid_loss: Callable[[nn.Module, Any, Tensor], Tensor],
        *,
        opt_w: torch.optim.Optimizer,
        opt_h: torch.optim.Optimizer,
        opt_s: torch.optim.Optimizer | None = None,
        train_steps: int = 2,
        valid_steps: int = 1,
        entropy_weight: float = 1e-3,
        tune_scale: bool = True,
        warmup: int = 0,
        max_grad_norm: float | None = None,
        batch_size: Callable[[Any], int] | int | None = None,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(hparams, HyperparameterSet):
            raise TypeError(f"hparams must be a HyperparameterSet, got {type(hparams).__name__}")
        if (opt_s is None) == tune_scale:
            raise ValueError(f"opt_s must be given with tune_scale=True, and only there, got {opt_s} and {tune_scale}")
        wanted = {"opt_h": (opt_h, hparams.unconstrained)} | ({"opt_s": (opt_s, hparams.raw_scale)} if opt_s else {})
        for name, (optimizer, parameter) in wanted.items():
            if _owned(optimizer) != {id(parameter)}:
                raise ValueError(
                    f"{name} must hold one parameter of hparams, unconstrained for opt_h, raw_scale for opt_s"
                )
        if _owned(opt_w) & {id(parameter) for parameter in hparams.parameters()}:
            raise ValueError("opt_w must not hold parameters of hparams: the training loss would choose them")
        self.model, self.hparams, self.train_loss, self.valid_loss = model, hparams, train_loss, valid_loss
        self.opt_w, self.opt_h, self.opt_s = opt_w, opt_h, opt_s
        self.train_steps = _checks.positive_int("train_steps", train_steps)
        self.valid_steps = _checks.positive_int("valid_steps", valid_steps)
        self.entropy_weight = _checks.number("entropy_weight", entropy_weight, 0)
        self.warmup = _checks.positive_int("warmup", warmup, minimum=0)
        self.max_grad_norm = None if max_grad_norm is None else _checks.positive_number("max_grad_norm", max_grad_norm)
        if batch_size is not None and not callable(batch_size):
            _checks.positive_int("batch_size", batch_size)
        self.batch_size, self.generator = batch_size, generator
        self.steps = 0
        self.history: dict[str, list[Tensor]] = {"unconstrained": [], "scale": []}

    def _perturbed(self, batch: Any) -> Tensor:
        size = self.batch_size
        count = _first_length(batch) if size is None else size(batch) if callable(size) else size
        return self.hparams.perturb(count, self.generator)

    def _fit_response(self, batch: Any) -> Tensor:
        """Phase A: one update of the response's parameters."""
        with torch.no_grad():
            h = self._perturbed(batch)
            rates = self.hparams.constrain(h)
        loss = self.train_loss(self.model, batch, h, rates)
        self.opt_w.zero_grad()
        loss.backward()
        if self.max_grad_norm is not None:
            held = [parameter for group in self.opt_w.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(held, self.max_grad_norm)
        self.opt_w.step()
        return loss.detach()

    def _move_hyperparameters(self, batch: Any) -> Tensor:
        """Phase B: one update of the hyperparameters and, if tuned, of the scales of their perturbation."""
        hparams = self.hparams
        if self.opt_s is None:
            optimizers, parameters, h = [self.opt_h], [hparams.unconstrained], hparams.unconstrained
        else:
            optimizers, parameters = [self.opt_h, self.opt_s], [hparams.unconstrained, hparams.raw_scale]
            h = self._perturbed(batch)
        loss = self.valid_loss(self.model, batch, h)
        objective = loss if self.opt_s is None else loss - self.entropy_weight * hparams.entropy()
        # Of these parameters only: a backward pass would leave gradients in the weights, too.
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
        if gradients[0] is None:
            raise ValueError("valid_loss must depend on h: without it the hyperparameters have no gradient")
        for optimizer, parameter, gradient in zip(optimizers, parameters, gradients, strict=True):
            parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def step(self, train_batches: Iterable[Any], valid_batches: Iterable[Any]) -> dict[str, Tensor]:
        """Make ``train_steps`` updates of the response and, after the warm-up, ``valid_steps`` of the hyperparameters.

        Args:
            train_batches: a sequence of ``train_steps`` batches, or an iterator, of which the next ones are taken.
            valid_batches: likewise ``valid_steps`` batches; in the warm-up none is taken from an iterator.

        Returns:
            ``train_loss`` and ``valid_loss``, the means over this call's updates, detached, shape ``()``; ``valid_loss`` is NaN in the warm-up.

        Raises:
            ValueError: for another number of batches, before anything is changed; or for a validation loss that does not depend on ``h``.
        """
        tunes = self.steps >= self.warmup
        train = _drawn("train_batches", train_batches, self.train_steps)
        valid = _drawn("valid_batches", valid_batches, self.valid_steps) if tunes else []
        self.history["unconstrained"].append(self.hparams.unconstrained.detach().clone())
        self.history["scale"].append(self.hparams.scale.detach().clone())
        mode = self.model.training
        try:
            self.model.train()
            train_losses = torch.stack([self._fit_response(batch) for batch in train])
            self.model.eval()
            valid_losses = [self._move_hyperparameters(batch) for batch in valid]
        finally:
            self.model.train(mode)
        self.steps += 1
        unknown = train_losses.new_full((), math.nan)
        return {"train_loss": train_losses.mean(), "valid_loss": torch.stack(valid_losses).mean() if valid else unknown}

    def schedule(self) -> dict[str, Tensor]:
        """The values of the hyperparameters in phase A of each step, without perturbation: for each name ``(steps,)``. See :func:`replayed_rates`."""
        if not self.steps:
            raise ValueError("schedule needs at least one step before")
        return self.hparams.constrain(torch.stack(self.history["unconstrained"]))

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here: model, hyperparameters, optimizers, counters, history, and the generator's state where there is one.

        Not in it: the order of your batches, and torch's global generator, from which the model's own dropout draws.
        """
        history = {name: torch.stack(values) for name, values in self.history.items() if values}
        parts = {name: getattr(self, name).state_dict() for name in self._stateful()}
        generator = {} if self.generator is None else {"generator": self.generator.get_state()}
        return {"steps": self.steps, "history": history, **parts, **generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Args:
            state: of a trainer that was made with the same arguments.

        Raises:
            ValueError: for a state with other parts.
        """
        needed = {"steps", "history", *self._stateful()} | (set() if self.generator is None else {"generator"})
        if set(state) != needed:
            raise ValueError(f"state must have the parts {sorted(needed)}, got {sorted(state)}")
        for name in self._stateful():
            getattr(self, name).load_state_dict(state[name])
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
        self.steps = state["steps"]
        self.history = {name: list(state["history"].get(name, [])) for name in self.history}

    def _stateful(self) -> tuple[str, ...]:
        return ("model", "hparams", "opt_w", "opt_h") + (() if self.opt_s is None else ("opt_s",))


def replayed_rates(
    schedule: Mapping[str, Tensor], update: int, batch_size: int, *, train_steps: int = 2
) -> dict[str, Tensor]:
    """The rates of a recorded schedule, for training an ordinary network with it.

    Args:
        schedule: for each name ``(T,)``, one value for each step of :class:`STNTrainer`, from its ``schedule()``.
        update: the number of the weight update, from 0. Updates beyond the schedule keep its last value.
        batch_size: B.
        train_steps: weight updates in each step of the recorded run.

    Returns:
        For each name ``(B,)``.

    Raises:
        TypeError, ValueError: for a wrong type or value, naming the argument.

    Source: MacKay et al., the study of schedules.

    Example:
        >>> replayed_rates({"dropout": torch.tensor([0.1, 0.2, 0.3])}, update=3, batch_size=2)
        {'dropout': tensor([0.2000, 0.2000])}
    """
    _checks.positive_int("update", update, minimum=0)
    entry = update // _checks.positive_int("train_steps", train_steps)
    _checks.positive_int("batch_size", batch_size)
    for name, values in schedule.items():
        _checks.floating(f"schedule[{name!r}]", values, 1)
    return {name: values[min(entry, len(values) - 1)].expand(batch_size) for name, values in schedule.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Exact responses
# ---------------------------------------------------------------------------------------------------------------------


def _log_penalty(lam: float | Tensor, like: Tensor) -> Tensor:
    if not isinstance(lam, Tensor):
        return torch.tensor(_checks.number("lam", lam), dtype=like.dtype, device=like.device)
    if not lam.is_floating_point() or lam.dtype != like.dtype:
        raise TypeError(f"lam must have the dtype of X, {like.dtype}, got {lam.dtype}")
    return _checks.finite("lam", lam)


def _regression(X: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    _checks.finite("X", _checks.floating("X", X, 2))
    _checks.finite("t", _checks.floating("t", t, 1))
    if len(t) != len(X) or t.dtype != X.dtype:
        raise ValueError(
            f"t must have shape ({len(X)},) and the dtype of X, {X.dtype}, got {tuple(t.shape)}, {t.dtype}"
        )
    return X, t


def _principal(X: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Singular values, which of them count, the rows V^T, and U^T t."""
    U, values, Vh = torch.linalg.svd(X, full_matrices=False)
    counts = values > values[0] * max(X.shape) * torch.finfo(X.dtype).eps
    return values, counts, Vh, U.mT @ t


def ridge_response(X: Tensor, t: Tensor, lam: float | Tensor, *, mean: bool = False) -> Tensor:
    r"""The best response of ridge regression (eq-self_tuning-ridge): :math:`w^*(\lambda)=\arg\min_w\|Xw-t\|^2+e^\lambda\|w\|^2`.

    Computed by :math:`V\operatorname{diag}(\sigma(2\log\varsigma-\lambda)/\varsigma)U^\top t`, which is finite for every :math:`\lambda`. Directions in which X
    has no variance, up to rounding, get no weight.

    Args:
        X: ``(N, D)``, floating point.
        t: ``(N,)``, the dtype of ``X``.
        lam: :math:`\lambda`, a number or a tensor of any shape ``(...)``, the dtype of ``X``; differentiable.
        mean: divide the squared error by N. Then :math:`e^\lambda` acts as :math:`Ne^\lambda` does without.

    Returns:
        Shape ``(..., D)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(N D min(N, D)) time once, and O(D min(N, D)) for each :math:`\lambda`.

    Source: MacKay et al., the example of a linear network; ridge regression.

    Example:
        >>> ridge_response(torch.eye(2), torch.tensor([1.0, 2.0]), 0.0)
        tensor([0.5000, 1.0000])
    """
    _regression(X, t)
    lam = _log_penalty(lam, X) + (math.log(len(X)) if mean else 0.0)
    values, counts, Vh, coordinates = _principal(X, t)
    safe = torch.where(counts, values, 1.0)
    gates = torch.sigmoid(2 * safe.log() - lam[..., None])
    return torch.where(counts, gates * coordinates / safe, 0.0) @ Vh


def linear_best_response(X: Tensor, t: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""A best response of a linear network :math:`y=s^\top Qx` to a penalty on its Jacobian (eq-self_tuning-gating).

    :math:`Q^*(\lambda)=\sigma(2\log\varsigma-\lambda)\odot_{\rm row}V^\top` and :math:`s^*=\operatorname{diag}(\varsigma)^{-1}U^\top t`, from
    :math:`X=U\operatorname{diag}(\varsigma)V^\top`, minimize :math:`\sum(y-t)^2+\frac{e^\lambda}N\sum\|\partial y/\partial x\|^2`.

    Args:
        X: ``(N, D)``, floating point, of full column rank.
        t: ``(N,)``, the dtype of ``X``.
        lam: :math:`\lambda`, a number or a tensor of shape ``()``; differentiable.

    Returns:
        Q ``(D, D)``, s ``(D,)``, and the gates ``(D,)`` in (0, 1), from the largest singular value to the smallest.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, or dependent columns, naming the argument.

    Complexity: O(N D²).

    Source: MacKay et al., the best response of a two-layer linear network.

    Example:
        >>> linear_best_response(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2), 0.0)[2]  # 9 / (9 + 1), 1 / (1 + 1)
        tensor([0.9000, 0.5000])
    """
    _regression(X, t)
    lam = _log_penalty(lam, X)
    if lam.ndim:
        raise ValueError(f"lam must have shape (), got {tuple(lam.shape)}")
    values, counts, Vh, coordinates = _principal(X, t)
    if X.shape[1] > len(X) or _checks.known_false(counts):
        raise ValueError(
            f"X must have independent columns, got shape {tuple(X.shape)} and smallest singular value {values[-1]:.1e}"
        )
    gates = torch.sigmoid(2 * values.log() - lam)
    return gates[:, None] * Vh, coordinates / values, gates


def quadratic_response(A: Tensor, B: Tensor, d: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    r"""The best response of a quadratic training loss, which is affine (eq-self_tuning-affine): its value and its Jacobian at :math:`\lambda`.

    For :math:`L_T=\frac12w^\top Aw+w^\top B\lambda+d^\top w+\dots` they are :math:`w_0=-A^{-1}(B\lambda+d)` and :math:`\Theta=-A^{-1}B`. The expected loss of
    :math:`w_0+\Theta\epsilon` at :math:`\lambda+\epsilon` is least there, for every perturbation of mean 0 with a regular covariance.

    Args:
        A: ``(p, p)``, symmetric, positive definite, floating point.
        B: ``(p, n)``; d: ``(p,)``; lam: ``(n,)``; the dtype of ``A``.

    Returns:
        :math:`w_0` ``(p,)`` and :math:`\Theta` ``(p, n)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(p³).

    Source: MacKay et al., the justification of the local approximation.

    Example:
        >>> w0, Theta = quadratic_response(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([0.0]), torch.tensor([3.0]))
        >>> w0, Theta
        (tensor([-1.5000]), tensor([[-0.5000]]))
    """
    p, columns = len(_checks.floating("A", A, 2)), _checks.floating("B", B, 2).shape[1]
    for name, value, shape in (("A", A, (p, p)), ("B", B, (p, columns)), ("d", d, (p,)), ("lam", lam, (columns,))):
        if _checks.floating(name, value).shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    factor, info = torch.linalg.cholesky_ex(A)
    if _checks.known_false(info == 0) or _checks.known_false(torch.isclose(A, A.mT, rtol=1e-4, atol=1e-6)):
        raise ValueError("A must be symmetric and positive definite")
    return -torch.cholesky_solve((B @ lam + d)[:, None], factor)[:, 0], -torch.cholesky_solve(B, factor)


def expected_ridge_response(X: Tensor, t: Tensor, lam: float | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    r"""What phase A tends to in ridge regression (eq-self_tuning-bias): the affine response with the least expected loss around :math:`\lambda`.

    The minimizer :math:`(w_0,\theta)` of :math:`\mathbb E_u\frac1N\|X(w_0+u\theta)-t\|^2+e^u\|w_0+u\theta\|^2` over :math:`u\sim\mathcal N(\lambda,\sigma^2)`. As
    :math:`\sigma\to0`, :math:`w_0+\lambda\theta` and :math:`\theta` tend to :math:`w^*(\lambda)` and its derivative.

    Computed by the gates of the principal components (eq-self_tuning-bias-gates), which are finite for every :math:`\lambda`. Directions in which X has no
    variance, up to rounding, get no weight.

    Args:
        X: ``(N, D)``, floating point.
        t: ``(N,)``, the dtype of ``X``.
        lam: :math:`\lambda`, a number or a tensor of any shape ``(...)``, the dtype of ``X``; differentiable.
        scale: :math:`\sigma` > 0.

    Returns:
        :math:`w_0` and :math:`\theta`, each of shape ``(..., D)``.

    Raises:
        TypeError, ValueError: for a wrong type, shape or value, naming the argument.

    Complexity: O(N D min(N, D)) time once, and O(D min(N, D)) for each :math:`\lambda`.

    Source: the chapter, from the objective of MacKay et al.

    Example:
        >>> w0, theta = expected_ridge_response(torch.eye(1).double(), torch.ones(1).double(), 0.0, 0.01)
        >>> round(w0.item(), 3), round(theta.item(), 3)  # 1 / (1 + e^u) at u = 0, and its derivative
        (0.5, -0.25)
    """
    _regression(X, t)
    lam = _log_penalty(lam, X)[..., None]
    variance = _checks.positive_number("scale", scale) ** 2
    values, counts, Vh, coordinates = _principal(X, t)
    safe = torch.where(counts, values, 1.0)
    level = lam + variance / 2 + math.log(len(X)) - 2 * safe.log()
    open_, closed = torch.sigmoid(-level), torch.sigmoid(level)
    weight = torch.where(counts, coordinates / safe, 0.0) * open_ / (1 + variance * open_ * closed)
    center, theta = (weight * (1 + variance * closed)) @ Vh, -(weight * closed) @ Vh
    return center - lam * theta, theta


def implicit_hypergradient(
    train_loss: Callable[[Tensor, Tensor], Tensor],
    valid_loss: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    lam: Tensor,
) -> Tensor:
    r"""The exact hypergradient by the implicit function theorem (eq-self_tuning-hypergradient), for small problems.

    :math:`\frac{d}{d\lambda}L_V(\lambda,w^*(\lambda))=\partial_\lambda L_V-(\partial^2_{w\lambda}L_T)^\top[\partial^2_{ww}L_T]^{-1}\partial_wL_V`.

    Args:
        train_loss, valid_loss: called as ``loss(lam, w)``, scalars, made of operations that ``torch.func`` can differentiate.
        w: ``(p,)``, the minimizer of ``train_loss(lam, .)``; at another point the formula is not the hypergradient.
        lam: ``(n,)``, the dtype of ``w``.

    Returns:
        Shape ``(n,)``.

    Raises:
        TypeError, ValueError: for a wrong type or shape, or a Hessian that is not positive definite.

    Complexity: O(p) gradients for the Hessian, O(p²) memory, O(p³) for the solve.

    Source: MacKay et al., the lemma on the hypergradient.

    Example:
        >>> train = lambda lam, w: ((w - 1).square() + lam.exp() * w.square()).sum()
        >>> valid = lambda lam, w: w.square().sum()
        >>> implicit_hypergradient(train, valid, torch.tensor([0.5]), torch.tensor([0.0]))  # w* = 1 / (1 + e^lam)
        tensor([-0.2500])
    """
    _checks.floating("w", w, 1)
    if _checks.floating("lam", lam, 1).dtype != w.dtype:
        raise TypeError(f"lam must have the dtype of w, {w.dtype}, got {lam.dtype}")
    w, lam = w.detach(), lam.detach()
    hessian = torch.func.hessian(train_loss, argnums=1)(lam, w)
    mixed = torch.func.jacfwd(torch.func.grad(train_loss, argnums=1), argnums=0)(lam, w)
    direct, along_w = torch.func.grad(valid_loss, argnums=(0, 1))(lam, w)
    factor, info = torch.linalg.cholesky_ex(hessian)
    if _checks.known_false(info == 0):
        raise ValueError("train_loss must have a positive definite Hessian in w")
    return direct - mixed.mT @ torch.cholesky_solve(along_w[:, None], factor)[:, 0]
