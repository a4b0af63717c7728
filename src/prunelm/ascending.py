"""One list found again in a longer one of the same order."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ascending(cost: Float[Tensor, "few many"]) -> Int[Tensor, " few"]:
    """A column for each row, in ascending order, so that the costs add up to the least; of equals the first.

    g(i, k) = cost(i, i + k) + min over l >= k of g(i + 1, l), where k columns are left out before row i.
    """
    few, many = cost.shape
    spare = many - few + 1
    left_out = torch.arange(few)[:, None] + torch.arange(spare)
    total = cost.double().gather(1, left_out.to(cost.device))
    for i in range(few - 2, -1, -1):
        total[i] += total[i + 1].flip(0).cummin(0).values.flip(0)
    total = total.cpu()
    found, start = [], 0
    for i in range(few):
        rest = total[i, start:]
        start += int((rest == rest.min()).nonzero()[0])
        found.append(i + start)
    return torch.tensor(found, dtype=torch.long)
