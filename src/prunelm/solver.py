"""The one linear system behind every reconstruction: damped least squares, pulled towards the present weights."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from .distributed import shared_rows
from .errors import CalibrationError
from .placement import ROWS

FACTORS = (1, 10, 100, 1_000, 10_000)


def damped_fit(
    second: Float[Tensor, "channel channel"],
    cross: Float[Tensor, "out channel"],
    prior: Float[Tensor, "out channel"],
    damping: Float[Tensor, " channel"],
    *,
    tokens: int,
) -> Float[Tensor, "out channel"]:
    """Argmin over V of sum ||y - V x||^2 + sum_j D_j ||V_j - P_j||^2: (sum y x^T + P D)(sum x x^T + D)^-1.

    One Cholesky of channel x channel in the dtype of `second`. Where that fails, ten times the damping is tried, up
    to ten thousand times. No copy of `second` is made, such matrices being large: its diagonal is put back at the end.
    The result has the dtype of `prior`.

    Raises:
        CalibrationError: the moments cannot be factored even so; says how many tokens would do.
    """
    root, now = factored(second, damping, tokens=tokens)
    return shared_rows(partial(_solved, root, cross, prior, now), prior, ROWS)


class NestedFits:
    """Damped fits over the first channels of an order, any number of them, from one factorization.

    The root of the leading channels' moments is the leading part of the root L of all of them, and so is the solution
    of its first triangular system: V_k = [L^-1 (sum x y^T + D P^T)]_k^T (L_kk)^-1. A fit costs one triangular solve.
    Arguments as for `damped_fit`, channels in their order.

    Raises:
        CalibrationError: as there.
    """

    def __init__(
        self,
        second: Float[Tensor, "channel channel"],
        cross: Float[Tensor, "out channel"],
        prior: Float[Tensor, "out channel"],
        damping: Float[Tensor, " channel"],
        *,
        tokens: int,
    ) -> None:
        self._root, now = factored(second, damping, tokens=tokens)
        self._dtype = prior.dtype
        self._half = torch.linalg.solve_triangular(self._root, (cross + prior.to(now) * now).T, upper=False).T

    def first(self, count: int) -> Float[Tensor, "out count"]:
        """The fit over the first channels alone, in the dtype of the prior."""
        root = self._root[:count, :count]
        half = self._half[:, :count]
        like = half.new_empty(half.shape, dtype=self._dtype)
        return shared_rows(lambda rows: _backward(root, half[rows], self._dtype), like, ROWS)


def _backward(
    root: Float[Tensor, "count count"], half: Float[Tensor, "out count"], dtype: torch.dtype
) -> Float[Tensor, "out count"]:
    """Some rows of a fit, from the first triangular system's solution."""
    found: Tensor = torch.linalg.solve_triangular(root, half, upper=False, left=False)
    return found.to(dtype)


def factored(
    second: Float[Tensor, "channel channel"],
    damping: Float[Tensor, " channel"],
    *,
    tokens: int,
    least: Float[Tensor, " channel"] | None = None,
) -> tuple[Float[Tensor, "channel channel"], Float[Tensor, " channel"]]:
    """The Cholesky root of the damped moments, and the damping that it took; see `damped_fit`.

    Where more is tried, it is at least `least`, and 1e-7 of the mean energy.

    Raises:
        CalibrationError: as there.
    """
    energy = second.diagonal().clone()
    floor = damping.clamp_min(1e-7 * float(energy.mean()))
    floor = floor if least is None else floor.maximum(least)
    try:
        for factor in FACTORS:
            now = damping if factor == 1 else floor * factor
            second.diagonal().copy_(energy + now)
            root, info = torch.linalg.cholesky_ex(second)
            if int(info) == 0:
                return root, now
    finally:
        second.diagonal().copy_(energy)
    raise CalibrationError(
        f"{tokens:,} tokens cannot determine {len(second):,} channels. Use at least {4 * len(second):,} tokens or "
        "a larger --ridge."
    )


def _solved(
    root: Float[Tensor, "channel channel"],
    cross: Float[Tensor, "out channel"],
    prior: Float[Tensor, "out channel"],
    damping: Float[Tensor, " channel"],
    rows: slice,
) -> Float[Tensor, "_ channel"]:
    """Some rows of the solution, in the dtype of `prior`."""
    return torch.cholesky_solve((cross[rows] + prior[rows].to(damping) * damping).T, root).T.to(prior)


def energy_damping(second: Float[Tensor, "channel channel"], ridge: float) -> Float[Tensor, " channel"]:
    """D_j = ridge x E[x_j^2], of centered x where `second` is a covariance, and a trace for channels that never fire.

    Relative to each channel's own energy, so that a few channels of enormous activations do not damp all others. A
    variance that rounding made negative counts as 0.
    """
    energy = second.diagonal().clamp_min(0)
    return ridge * energy + 1e-9 * energy.mean() + torch.finfo(energy.dtype).tiny
