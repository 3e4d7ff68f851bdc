"""Which hidden neurons to keep: greedy Gram-Schmidt on the rows of the first MLP weight.

Shen et al., arXiv 2506.08591, section 3. Within a round this is column-pivoted QR of the weight's
transpose.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Both relative to the round's first maximum.
FLOOR = 1e-10
TIE = 1e-12


class Order(NamedTuple):
    """Rows in greedy order, and how much diversity each still added."""

    indices: Tensor
    """``[width]`` int64; no index twice; the first k are the selection for width k."""
    residual_norms: Tensor
    """``[width]`` float64: the L2 norm of a row less its projection on those its round took before."""


def gram_schmidt_order(weight: Tensor, width: int) -> Tensor:
    """Indices of the ``width`` most diverse rows of ``weight`` ``[M, N]``, in greedy order.

    A round repeatedly takes the row with the largest residual norm and subtracts from every
    residual its projection on the taken one. It ends after N rows, or when the largest residual
    norm falls under 1e-10 of the round's first; the next round starts on the rows not yet taken,
    with their original weights. A round that takes none takes the rest by index. Norms within
    1e-12 of the round's first maximum of each other tie, and the lowest index wins.

    Returns:
        LongTensor ``[width]`` on the CPU.

    Raises:
        ValueError: ``weight`` is no matrix, holds NaN or infinity, or has fewer rows than ``width``.
    """
    return gram_schmidt(weight, width).indices


def gram_schmidt(weight: Tensor, width: int) -> Order:
    """As :func:`gram_schmidt_order`, with the residual norms."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix [M, N], not {list(weight.shape)}")
    if not 0 <= width <= len(weight):
        raise ValueError(f"width {width} must be between 0 and the {len(weight)} rows of weight")
    rows = weight.detach().double()
    if not rows.isfinite().all():
        raise ValueError("weight holds NaN or infinity")
    remaining = torch.arange(len(rows), device=rows.device)
    indices: list[Tensor] = []
    norms: list[Tensor] = []
    wanted = width
    while wanted > 0:
        taken, taken_norms = _round(rows[remaining], wanted)
        if len(taken) == 0:
            taken = torch.arange(wanted, device=rows.device)
            taken_norms = torch.zeros(wanted, dtype=rows.dtype, device=rows.device)
        indices.append(remaining[taken])
        norms.append(taken_norms)
        left = torch.ones(len(remaining), dtype=torch.bool, device=rows.device)
        left[taken] = False
        remaining = remaining[left]
        wanted -= len(taken)
    if not indices:
        return Order(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.double))
    return Order(torch.cat(indices).cpu(), torch.cat(norms).cpu())


def _round(residuals: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """One round on ``residuals`` ``[m, N]``, which it consumes: positions taken and their norms."""
    taken: list[Tensor] = []
    norms: list[Tensor] = []
    free = torch.ones(len(residuals), dtype=torch.bool, device=residuals.device)
    first_maximum = None
    for _ in range(min(most, *residuals.shape)):
        current = torch.where(free, torch.linalg.vector_norm(residuals, dim=1), -torch.inf)
        maximum = current.max()
        if first_maximum is None:
            first_maximum = maximum
        if maximum <= FLOOR * first_maximum:
            break
        # argmax of a boolean mask is the lowest index that ties.
        pick = (current >= maximum - TIE * first_maximum).int().argmax()
        direction = residuals[pick] / current[pick]
        residuals = residuals - torch.outer(residuals @ direction, direction)
        free[pick] = False
        taken.append(pick)
        norms.append(current[pick])
    if not taken:
        empty = torch.empty(0, device=residuals.device)
        return empty.long(), empty.double()
    return torch.stack(taken), torch.stack(norms)
