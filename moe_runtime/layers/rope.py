"""Tables of cos and sin for rotary position embeddings, for each way of scaling the frequencies."""

import math
from dataclasses import dataclass

import torch

from moe_runtime.kernels import CPU
from moe_runtime.model_config import RopeConfig


@dataclass(frozen=True)
class Rotation:
    """cos and sin, float32 [positions, rotary_dim / 2]; pairs are (2i, 2i + 1) if interleaved, else (i, i +
    half).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


def build_rotation(config: RopeConfig, num_positions: int, device: torch.device = CPU) -> Rotation:
    """Angles are float32 products, as in every engine these models were trained and judged with. Computed on
    the CPU, so that every ``device`` has the same numbers.
    """
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies(config)
    cos, sin = angles.cos() * config.table_scale, angles.sin() * config.table_scale
    return Rotation(cos.to(device), sin.to(device), config.interleaved)


def frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians per position for each pair, float32 [rotary_dim / 2]."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, plain)
    return plain


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are divided by the factor, short ones kept, those between blended by wavelength."""
    turns = config.original_context * plain / (2 * math.pi)  # full turns over the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Dimensions that turn often keep their frequency, those that turn rarely are divided, with a ramp
    between.
    """

    def dimension_turning(times: float) -> float:
        ratio = math.log(config.original_context / (times * 2 * math.pi))
        return config.rotary_dim * ratio / (2 * math.log(config.theta))

    low, high = dimension_turning(config.beta_fast), dimension_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = ((torch.arange(config.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / config.factor * ramp + plain * (1 - ramp)
