"""MagR: weights of smaller magnitude that give a layer almost the same outputs (Zhang et al., NeurIPS 2024).

A grid of few bits spans the largest weight of a group. MagR moves weights along directions that the layer's inputs
hardly reach, so that the largest weight shrinks and the grid becomes finer. For each output and each group g of its
inputs it minimises

    1/2 ||X (w - w0)||^2 / s^2 + alpha * sum over g of max |w_g|,

where ``X`` are calibration inputs and ``s`` is their largest singular value (arXiv 2406.00800, equation 4; the sum over
groups is what the authors' release does where a grid belongs to a group).
"""

from __future__ import annotations

import torch

ALPHA = 1e-4
"""The penalty that the authors use for grids of a group of inputs."""
ALPHA_OF_ROWS = 1e-3
"""The penalty that the authors use for grids of a whole output."""
ITERATIONS = 200


def reduce_magnitude(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    group_size: int | None,
    alpha: float,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """The weight of smaller magnitude, by accelerated proximal gradient descent (Beck and Teboulle, 2009).

    Args:
        weight: ``(out_features, in_features)`` in fp32 or fp64.
        gram: ``(in_features, in_features)`` in the weight's dtype: the sum of ``x x^T`` over calibration inputs, up
            to a factor, which does not matter.
        group_size: inputs that share a grid; it divides ``in_features``. None where a whole output does.
        alpha: weight of the penalty.
        iterations: steps. The momentum starts anew where it would raise the objective.

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
        # O'Donoghue and Candes (2015): momentum that points uphill has gone too far.
        if ((ahead - following) * (following - current)).sum() > 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - current)
        current, momentum = following, grown
    return current


def objective(
    reduced: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, *, group_size: int | None, alpha: float
) -> torch.Tensor:
    """What MagR minimises, for each output: ``(out_features,)``. See :func:`reduce_magnitude` for the arguments."""
    change = reduced - weight
    error = ((change @ (gram / torch.linalg.eigvalsh(gram)[-1])) * change).sum(1) / 2
    largest = reduced.unflatten(1, (-1, group_size or weight.shape[1])).abs().amax(2)
    return error + alpha * largest.sum(1)


def shrink_largest(weight: torch.Tensor, scale: float, group_size: int) -> torch.Tensor:
    """The proximal operator of ``scale`` times the largest absolute value of each group.

    By Moreau's identity it takes away the projection on the ball of the dual norm, that of absolute values summed.

    Args:
        weight: ``(rows, columns)``.
        scale: weight of the norm.
        group_size: neighbouring columns of a row that are a group; it divides the number of columns.
    """
    groups = weight.unflatten(1, (-1, group_size))
    return (groups - project_on_l1_ball(groups, scale)).flatten(1)


def project_on_l1_ball(vectors: torch.Tensor, radius: float) -> torch.Tensor:
    """The nearest vectors whose absolute values sum up to at most the radius.

    Their entries are shrunk by the same amount and cut at zero (Duchi et al., ICML 2008). That amount is the root of a
    convex and piecewise linear function, which Newton's method reaches from below in as many steps as there are pieces
    on the way: few, where the radius is small beside the entries.

    Args:
        vectors: ``(..., size)``.
        radius: above 0.
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
