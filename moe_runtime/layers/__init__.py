"""Building blocks of every architecture: linear, norm, rope, attention, moe."""
