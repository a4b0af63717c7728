"""Running moments of activations: the only thing that calibration leaves behind.

With a token's activation a (one row): tokens = n, total = sum a, gram = sum a a^T (or only its diagonal).
Chunks are multiplied in float32 and summed in float64, so order and chunking change nothing that matters. (A streamed
run may sum in float32: `--statistics-dtype`.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .distributed import my_rows, shared_rows, summed, summed_number
from .errors import CalibrationError
from .placement import ROWS, exact

PARTS = 4
"""Runs of channels whose products with the channels behind them are not computed but mirrored."""


class Moments:
    """First and second moments of one layer's input over tokens; accumulates with `update`."""

    def __init__(
        self,
        channels: int,
        *,
        full: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.full = full
        self.tokens = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.gram = torch.zeros((channels, channels) if full else channels, dtype=dtype, device=device)

    def update(self, a: Float[Tensor, "token channel"]) -> None:
        """Add the rows of `a`; padding must have been dropped before."""
        a = a.to(self.total.device)
        self.tokens += a.shape[0]
        self.total += a.sum(0, dtype=torch.float64)
        self.gram += squares(a) if self.full else a.float().square().sum(0, dtype=torch.float64)

    def settle(self) -> None:
        """End the summing: from here on everything is in float64."""
        self.gram = self.gram.double()

    def share(self) -> None:
        """Add what the other processes have seen."""
        self.tokens = int(summed_number(self.tokens))
        summed(self.total)
        summed(self.gram)

    @property
    def mean(self) -> Float[Tensor, " channel"]:
        """E[a]."""
        return self.total / self.tokens

    @property
    def energy(self) -> Float[Tensor, " channel"]:
        """E[a_c^2] of every channel."""
        return (self.gram.diagonal() if self.full else self.gram) / self.tokens

    @property
    def second_moment(self) -> Float[Tensor, "channel channel"]:
        """E[a a^T] as a new matrix; needs the full Gram matrix."""
        return self._whole() / self.tokens

    @property
    def covariance(self) -> Float[Tensor, "channel channel"]:
        """E[a a^T] - E[a] E[a]^T; needs the full Gram matrix."""
        return self.second_moment.addr_(self.mean, self.mean, alpha=-1)

    def fitted(self, bias: Tensor | None) -> Float[Tensor, "channel channel"]:
        """What a layer is fitted on: the covariance where it has a bias, which takes up the mean; else E[a a^T]."""
        return self.second_moment if bias is None else self.covariance

    def rounding(self, bias: Tensor | None) -> Float[Tensor, " channel"]:
        """What of the diagonal of `fitted` may be rounding: 1e-5 of E[a_c^2] where the mean was subtracted."""
        return torch.zeros_like(self.total) if bias is None else 1e-5 * self.energy

    def _whole(self) -> Float[Tensor, "channel channel"]:
        if not self.full:
            raise ValueError("these moments hold only the diagonal of the Gram matrix")
        return self.gram

    def check(self, where: str) -> None:
        """Raise unless something was seen and all of it is finite.

        Raises:
            CalibrationError: names the site.
        """
        if self.tokens == 0:
            raise CalibrationError(f"{where}: no token reached it. Give more calibration text.")
        if not bool(torch.isfinite(self.gram).all()):
            bad = int((~torch.isfinite(self.gram)).any(-1).sum() if self.full else (~torch.isfinite(self.gram)).sum())
            raise CalibrationError(
                f"{where}: {bad} of {len(self.total)} channels have non-finite statistics after {self.tokens} tokens. "
                "The weights or the arithmetic overflow: try --compute-dtype float32 or another checkpoint."
            )


class CrossMoments:
    """Moments of an input x together with a target y: all that a least-squares refit of y on x needs."""

    def __init__(
        self, targets: int, channels: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> None:
        self.x = Moments(channels, device=device, dtype=dtype)
        self.y_total = torch.zeros(targets, dtype=torch.float64, device=device)
        self.cross = torch.zeros(targets, channels, dtype=dtype, device=device)
        self.y_square = torch.zeros(targets, dtype=torch.float64, device=device)

    def update(self, y: Float[Tensor, "token out"], x: Float[Tensor, "token channel"]) -> None:
        """Add the rows of y and x, which belong to the same tokens."""
        x, y = (a.to(self.cross.device) for a in (x, y))
        self.x.update(x)
        self.y_total += y.sum(0, dtype=torch.float64)
        self.cross += products(y, x)
        self.y_square += y.float().square().sum(0, dtype=torch.float64)

    def settle(self) -> None:
        """End the summing: from here on everything is in float64."""
        self.x.settle()
        self.cross = self.cross.double()

    def share(self) -> None:
        """Add what the other processes have seen."""
        self.x.share()
        for total in (self.y_total, self.cross, self.y_square):
            summed(total)

    @classmethod
    def of_layer(
        cls, x: Moments, weight: Float[Tensor, "out channel"], bias: Float[Tensor, " out"] | None
    ) -> "CrossMoments":
        """Moments of an input with the layer's own output y = W x + b, from the input's moments alone."""
        w = exact(weight)
        twin = object.__new__(cls)
        twin.x = x
        twin.cross = shared_rows(lambda rows: w[rows] @ x.gram, w)
        twin.y_total = w @ x.total
        twin.y_square = (twin.cross * w).sum(1)
        if bias is not None:
            b = exact(bias)
            twin.y_square += 2 * b * twin.y_total + x.tokens * b.square()
            twin.cross += torch.outer(b, x.total)
            twin.y_total += x.tokens * b
        return twin

    def blended(
        self, weight: Float[Tensor, "out channel"], bias: Float[Tensor, " out"] | None, share: float
    ) -> "CrossMoments":
        """The same moments for the target share x y + (1 - share) x (W x + b)."""
        own = CrossMoments.of_layer(self.x, weight, bias)
        both = (exact(weight) * self.cross).sum(1)
        if bias is not None:
            both += exact(bias) * self.y_total
        rest = 1 - share
        own.y_square = rest**2 * own.y_square + 2 * share * rest * both + share**2 * self.y_square
        own.cross = share * self.cross + rest * own.cross
        own.y_total = share * self.y_total + rest * own.y_total
        return own

    def mapped(self, weight: Float[Tensor, "out target"], bias: Float[Tensor, " out"] | None) -> "CrossMoments":
        """The same moments for the target W y + b; target squares are not kept, so no residual can be asked of it."""
        w = exact(weight)
        twin = object.__new__(CrossMoments)
        twin.x = self.x
        twin.cross = w @ self.cross
        twin.y_total = w @ self.y_total
        twin.y_square = torch.full_like(twin.y_total, torch.nan)
        if bias is not None:
            twin.cross += torch.outer(exact(bias), self.x.total)
            twin.y_total += self.x.tokens * exact(bias)
        return twin

    def residual(
        self,
        weight: Float[Tensor, "out kept"],
        bias: Float[Tensor, " out"] | None,
        kept: Int[Tensor, " kept"] | None = None,
    ) -> float:
        """E||y - W x - b||^2 / E||y||^2, in closed form; 0 is a perfect fit. `kept` are the channels that W reads."""
        n = self.x.tokens
        gram, total = self.x.gram, self.x.total
        columns = torch.arange(len(gram)) if kept is None else kept
        if kept is not None:
            gram, total = gram[kept[:, None], kept], total[kept]
        sums = torch.zeros_like(self.y_square[:1]).expand(2).clone()
        fit, both = sums.unbind()
        for rows in my_rows(len(weight), ROWS):
            w = exact(weight[rows])
            fit += ((w @ gram) * w).sum()
            both += (w * self.cross[rows][:, columns]).sum()
            if bias is not None:
                b = exact(bias[rows])
                fit += 2 * (b * (w @ total)).sum() + n * b.square().sum()
                both += (b * self.y_total[rows]).sum()
        summed(sums)
        return float((self.y_square.sum() - 2 * both + fit) / self.y_square.sum().clamp_min(1e-300))


def output_energy(weight: Float[Tensor, "out channel"], second: Float[Tensor, "channel channel"]) -> Float[Tensor, ""]:
    """E||W x||^2 = sum over the rows w of W of w S w^T, with S = E[x x^T]; each process sums over some rows."""
    found = second.new_zeros(1)
    for rows in my_rows(len(weight)):
        found += ((weight[rows] @ second) * weight[rows]).sum()
    return summed(found)[0]


def products(y: Float[Tensor, "token out"], x: Float[Tensor, "token channel"]) -> Float[Tensor, "out channel"]:
    """Sum over tokens of y x^T, added up in float32.

    Products of 16-bit numbers are exact in float32; GPUs add them up there without a copy of the activations.
    """
    if x.is_cuda and x.dtype == y.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(y.T, x, out_dtype=torch.float32)
    return y.float().T @ x.float()


def squares(a: Float[Tensor, "token channel"]) -> Float[Tensor, "channel channel"]:
    """Sum over tokens of a a^T, as `products`; on CPUs most of the upper half is mirrored, not computed."""
    if a.device.type != "cpu":
        return products(a, a)
    a, n = a.float(), a.shape[1]
    found, step = a.new_empty(n, n), -(-n // PARTS)
    for start in range(0, n, step):
        stop = min(start + step, n)
        torch.mm(a[:, start:stop].T, a[:, :stop], out=found[start:stop, :stop])
        found[:start, start:stop] = found[start:stop, :start].T
    return found
