"""Float matrices to integers without calibration: for each group the scale that leaves the smallest squared
error.

With ``importance``, the second moments E[x_k^2] of the layer's input, the error of column k counts that much:
the error of the layer's output instead of the weights'. Works on a few rows at a time, so that the working
copies stay in the cache and memory is the result's.
"""

import torch

from moe_runtime.kernels.packed import QuantizedWeight, WeightFormat

ROUNDING_VERSION = 1  # of the numbers made here, which packed files keep
VALUES_PER_STEP = 1 << 19  # float32 working copies of 2 MiB
# How far the range of the codes is shrunk against the group's: cutting off the one largest weight of a group
# makes the step finer for all others.
SYMMETRIC_SHRINKAGE = (0.92, 1.0, 1.08, 1.16, 1.24, 1.34)
ZEROS_SHRINKAGE = (1.0, 1.07, 1.14, 1.22, 1.3)


def quantize(
    weight: torch.Tensor, format: WeightFormat, importance: torch.Tensor | None = None
) -> QuantizedWeight:
    """weight [N, K] of any float dtype as int8 or int4; ``importance`` float32 [K], not negative."""
    num_rows, in_features = weight.shape
    group = format.group or in_features
    num_groups = -(-in_features // group)
    codes = torch.empty(num_rows, in_features, dtype=torch.uint8)
    scales = torch.empty(num_rows, num_groups)
    zeros = torch.empty(num_rows, num_groups, dtype=torch.uint8) if format.zeros else None
    columns = _importance(importance, in_features, group)
    step = max(1, VALUES_PER_STEP // in_features)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        values, unit = _normalised(weight[rows])
        values = _grouped(values, group)
        if format.kind == "int8":
            scale, zero, levels = values.abs().amax(-1) / 127, 128.0, (1.0, 255.0)
        elif zeros is not None:
            scale, zero, levels = *_fit_with_zeros(values, columns), (0.0, 15.0)
            scale = round_scales(scale)
            zeros[rows] = zero
        else:
            scale, zero, levels = round_scales(_fit_symmetric(values, columns)), 8.0, (0.0, 15.0)
        scales[rows] = scale * unit
        rounded = _rounded(values, _inverse(scale))
        rounded += zero if isinstance(zero, float) else zero.unsqueeze(-1)
        codes[rows] = rounded.clamp_(*levels).flatten(1)[:, :in_features]
    return QuantizedWeight(codes, scales, zeros, format)


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """float32 [N, groups], changed to what the packed form can hold: a float16 in [-1, 1] times a power of
    two of the row.
    """
    unit = _power_of_two(scales.abs().amax(1, keepdim=True))
    return (scales / unit).half().float() * unit


def _normalised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, K] with a largest magnitude of 0.5 to 1, so that squares stay in range, and the power of
    two [rows, 1] that was taken out.
    """
    low, high = rows.aminmax(dim=1, keepdim=True)
    unit = _power_of_two(torch.maximum(-low.float(), high.float()))
    return rows.float() * unit.reciprocal(), unit


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The smallest above each value, and a normal number, as its reciprocal is."""
    return torch.frexp(values).exponent.clamp_(-126, 126).float().exp2_()


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups, group], zeros after the last column of a last group that is not full."""
    missing = -rows.shape[1] % group
    wide = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return wide.view(len(rows), -1, group)


def _importance(importance: torch.Tensor | None, in_features: int, group: int) -> torch.Tensor | None:
    """[1, groups, group] around 1; columns never seen in the statistics keep a little weight."""
    if importance is None:
        return None
    mean = importance.float().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return _grouped((importance.float() / mean).clamp_min(1e-4).unsqueeze(0), group)


def _fit_symmetric(values: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
    """[rows, groups]: the scale of codes -8..7. It is negative where that gives the largest weight the -8."""
    low, high = values.aminmax(dim=-1)
    largest = torch.where(high > -low, high, low)
    best = _Best(values, columns)
    for shrinkage in SYMMETRIC_SHRINKAGE:
        codes = _rounded(values, _inverse(largest / -8.0) * shrinkage).clamp_(-8.0, 7.0)
        best.offer(codes)
    return best.scale


def _fit_with_zeros(values: torch.Tensor, columns: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, groups] each: scale and zero point of codes 0..15."""
    low, high = values.aminmax(dim=-1)
    low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)  # zero itself is always a code
    best = _Best(values, columns)
    for shrinkage in ZEROS_SHRINKAGE:
        inverse = _inverse((high - low) / 15.0) * shrinkage
        zero = torch.round(-low / shrinkage * inverse).clamp_(0.0, 15.0)
        bottom = -zero.unsqueeze(-1)
        codes = _rounded(values, inverse)
        best.offer(torch.minimum(torch.maximum(codes, bottom, out=codes), bottom + 15.0, out=codes), zero)
    return best.scale, best.zero


class _Best:
    """The best of the codes offered so far, each with the scale that suits it: sum(x c) / sum(c c)."""

    def __init__(self, values: torch.Tensor, columns: torch.Tensor | None) -> None:
        self._weighted = values if columns is None else values * columns
        self._columns = columns
        self._gain = torch.full(values.shape[:2], -1.0)  # the squared error is sum(x x) - gain
        self.scale = torch.zeros(values.shape[:2])
        self.zero = torch.zeros(values.shape[:2])

    def offer(self, codes: torch.Tensor, zero: torch.Tensor | None = None) -> None:
        """codes [rows, groups, group], used up."""
        product = (codes * self._weighted).sum(-1)
        square = codes.square_() if self._columns is None else codes.square_().mul_(self._columns)
        norm = square.sum(-1).clamp_min_(1e-30)
        scale = product / norm
        gain = product.mul_(scale)
        better = gain > self._gain
        self._gain = torch.where(better, gain, self._gain)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _rounded(values: torch.Tensor, inverse_scale: torch.Tensor) -> torch.Tensor:
    return (values * inverse_scale.unsqueeze(-1)).round_()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for a group of zeros."""
    return torch.where(scale == 0, 0.0, scale.reciprocal())
