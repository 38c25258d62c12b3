"""MagR: weights of smaller magnitude that give a layer almost the same outputs (Zhang et al., NeurIPS 2024).

A quantization grid spans the largest weight of a group, so that with few bits one large weight makes it coarse. MagR
moves the weights along directions that the layer's inputs hardly use. The largest weight then shrinks, and the grid
becomes finer. For each output, MagR minimises

    1/2 ||X (w - w0)||^2 / s^2 + alpha * sum over groups g of max |w_g|,

where ``w`` are the output's weights, ``w0`` the original ones, ``X`` the calibration inputs, ``s`` the largest singular
value of ``X``, and ``g`` a group of the output's inputs (arXiv 2406.00800, equation 4). The sum over groups is what the
authors' release does where a grid belongs to a group.
"""

from __future__ import annotations

import torch

ALPHA_OF_ROWS = 1e-3
"""The authors' weight of the penalty where each whole output has a grid."""
ITERATIONS = 200


def reduce_magnitude(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    group_size: int | None,
    alpha: float,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """The weight that MagR finds, by accelerated proximal gradient descent (Beck and Teboulle, 2009).

    Args:
        weight: ``(out_features, in_features)`` in fp32 or fp64.
        gram: ``(in_features, in_features)`` in the weight's dtype: the sum of ``x x^T`` over calibration inputs. A
            positive factor makes no difference.
        group_size: number of inputs that share a grid; it divides ``in_features``. None where all inputs of an output
            share one.
        alpha: weight of the penalty.
        iterations: number of steps. The momentum starts anew where it would raise the objective.

    Returns:
        A tensor of the weight's shape and dtype.
    """
    largest = torch.linalg.eigvalsh(gram)[-1]
    if largest <= 0:
        return weight.clone()
    normalised = gram / largest
    group_size = group_size or weight.shape[1]
    current = ahead = weight
    momentum = 1.0
    for _ in range(iterations):
        following = shrink_largest(ahead - (ahead - weight) @ normalised, alpha, group_size)
        # Restart after O'Donoghue and Candes (2015): where the momentum points uphill, it has gone too far.
        if ((ahead - following) * (following - current)).sum() > 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - current)
        current, momentum = following, grown
    return current


def objective(
    reduced: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, *, group_size: int | None, alpha: float
) -> torch.Tensor:
    """The objective that MagR minimises, for each output: ``(out_features,)``.

    Args:
        reduced: ``(out_features, in_features)``, the weight after MagR, or any other one.
        weight: the original weight.
        gram: as for :func:`reduce_magnitude`.
        group_size: as for :func:`reduce_magnitude`.
        alpha: as for :func:`reduce_magnitude`.
    """
    change = reduced - weight
    error = ((change @ (gram / torch.linalg.eigvalsh(gram)[-1])) * change).sum(1) / 2
    largest = reduced.unflatten(1, (-1, group_size or weight.shape[1])).abs().amax(2)
    return error + alpha * largest.sum(1)


def shrink_largest(weight: torch.Tensor, scale: float, group_size: int) -> torch.Tensor:
    """The proximal operator of ``scale`` times the largest absolute value of each group.

    By Moreau's identity, it subtracts the projection on the ball of the dual norm, which is the l1 norm.

    Args:
        weight: ``(rows, columns)``.
        scale: weight of the norm, and radius of the ball.
        group_size: number of neighbouring columns of a row that form a group; it divides the number of columns.

    Returns:
        ``(rows, columns)``.
    """
    groups = weight.unflatten(1, (-1, group_size))
    return (groups - project_on_l1_ball(groups, scale)).flatten(1)


def project_on_l1_ball(vectors: torch.Tensor, radius: float) -> torch.Tensor:
    """For each vector the nearest one whose absolute values sum up to at most the radius.

    The absolute values of a vector are shrunk by one amount and cut at zero (Duchi et al., ICML 2008). That amount is
    the root of a convex and piecewise linear function. Newton's method reaches it from below and takes one step for
    each linear piece on its way. These are few where the radius is small beside the entries.

    Args:
        vectors: ``(..., size)``.
        radius: above 0.

    Returns:
        ``(..., size)``.
    """
    sizes = vectors.abs()
    threshold = (sizes.amax(-1, keepdim=True) - radius).clamp(min=0)
    for _ in range(vectors.shape[-1]):
        above = sizes - threshold
        count = (above > 0).sum(-1, keepdim=True).clamp(min=1)
        step = ((above.clamp_(min=0).sum(-1, keepdim=True) - radius) / count).clamp(min=0)
        if not (step > torch.finfo(step.dtype).eps * threshold).any():
            break
        threshold = threshold + step
    return vectors.sign() * (sizes - threshold).clamp_(min=0)
