"""Matrix products over the tokens of one cell, for all its projections ("roles") at once.

A cell's tokens are a matrix (M, C): samples times positions, channels. The same quantity of R roles
is either one tensor (R, M, C), worked on by batched products, or a list of R matrices (M, C),
worked on one by one. The second form is for large float32 cells on a CPU: there a 1x1 convolution
in channels_last reaches about twice the speed of a batched product, and matrices that each fit the
allocator's heap spare the page faults of one large tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Roles = Tensor | list[Tensor]

LISTED_PRODUCT = 2**23
"""M C^2 from which separate matrices are faster: measured at C = 18 to 288, 150 to 38400 tokens."""


def listed(x: Tensor) -> bool:
    """Whether the roles of a cell with tokens `x` (M, C) are kept as a list."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] * x.shape[1] ** 2 >= LISTED_PRODUCT
    )


def linear(x: Roles, weight: Tensor, bias: Tensor | None) -> Roles:
    """x_r W_r^T + b_r for weight (R, C_out, C) and bias (R, C_out).

    A single matrix `x` (M, C) is shared by all roles.
    """
    if isinstance(x, list) or (x.dim() == 2 and listed(x)):
        xs = x if isinstance(x, list) else [x] * weight.shape[0]
        weight = weight.contiguous()
        biases = [None] * len(xs) if bias is None else list(bias)
        return [_convolve(a, w, b) for a, w, b in zip(xs, weight, biases, strict=True)]
    if x.dim() == 2:
        x = x.expand(weight.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def outer(left: Roles, right: Roles) -> Tensor:
    """Sums over tokens of left_m right_m^T: (R, C, C). A single matrix `right` is shared."""
    if isinstance(left, list):
        rights = right if isinstance(right, list) else [right] * len(left)
        return torch.stack([_correlate(a, b) for a, b in zip(left, rights, strict=True)])
    assert isinstance(right, Tensor)
    return torch.bmm(left.transpose(1, 2), right.expand(left.shape[0], -1, -1))


def gather(x: Roles, weight: Tensor) -> Tensor:
    """Sum over roles of x_r W_r for weight (R, C, C_out): (M, C_out)."""
    if isinstance(x, list):
        transposed = weight.transpose(1, 2).contiguous()
        total = _convolve(x[0], transposed[0], None)
        for a, w in zip(x[1:], transposed[1:], strict=True):
            total.add_(_convolve(a, w, None))
        return total
    return torch.bmm(x, weight).sum(dim=0)


def sums(x: Roles) -> Tensor:
    """Sums over tokens, (R, C)."""
    if isinstance(x, list):
        return torch.stack([a.sum(dim=0) for a in x])
    return x.sum(dim=1)


def add_(x: Roles, y: Roles) -> Roles:
    """Add in place."""
    if isinstance(x, list):
        return [a.add_(b) for a, b in zip(x, y, strict=True)]
    assert isinstance(y, Tensor)
    return x.add_(y)


def relu_(x: Roles) -> Roles:
    """Rectify in place."""
    return [a.relu_() for a in x] if isinstance(x, list) else x.relu_()


def relu_backward(gradient: Roles, output: Roles) -> Roles:
    """`gradient` where the relu's `output` is positive, else 0."""
    backward = torch.ops.aten.threshold_backward
    if isinstance(gradient, list):
        return [backward(g, y, 0) for g, y in zip(gradient, output, strict=True)]
    result: Tensor = backward(gradient, output, 0)
    return result


def join(x: Roles, y: Roles) -> Roles:
    """The roles of both."""
    if isinstance(x, list):
        return [*x, *y]
    assert isinstance(y, Tensor)
    return torch.cat([x, y])


def _as_image(x: Tensor) -> Tensor:
    """Tokens (M, C) as channels_last images, 16 of them if possible.

    With a single thread torch leaves smaller batches to a convolution of half the speed.
    """
    images = 16 if x.shape[0] % 16 == 0 else 1
    return x.view(images, -1, 1, x.shape[1]).permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(_as_image(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(x.shape[0], weight.shape[0])


def _correlate(left: Tensor, right: Tensor) -> Tensor:
    """The weight gradient of `_convolve`, of which only the shape of the weight is needed."""
    weight = left.new_empty((left.shape[1], right.shape[1], 1, 1))
    product: Tensor = torch.ops.aten.convolution_backward(
        _as_image(left),
        _as_image(right),
        weight,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]
    return product[:, :, 0, 0]
