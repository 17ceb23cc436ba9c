"""What does a mask cost a decode step? `python bench/mask_cost.py DIR [--quantize int4] [--batch 16]`.

One engine's model, steps of ``batch`` random tokens over 128 cached ones, in turn without masks and with four
random masks of half of the experts mixed; steps with masks also measure lost mass. Alternating, so that what
else the machine does hits both; a masked step reads fewer distinct experts, so full masks are timed, too.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from common import machine, save, summary  # type: ignore[import-not-found]

from moe_runtime.batch import Batch, no_masks
from moe_runtime.config import EngineConfig
from moe_runtime.engine_load import load_parts
from moe_runtime.kernels import RouteMeter

CONTEXT, BLOCK = 128, 16


def write_masks(model: object) -> None:
    """Rows 0 to 3: random halves of the experts; row 4: all of them."""
    generator = torch.Generator().manual_seed(0)
    for _, mixture in model.mixtures():  # type: ignore[attr-defined]
        for row in range(4):
            kept = torch.randperm(mixture.config.num_experts, generator=generator)
            mixture.masks[row] = 0
            mixture.masks[row, kept[: mixture.config.num_experts // 2]] = 1
        mixture.masks[4] = 1


def main() -> None:
    """Load, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--packed-dir", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    config = EngineConfig(quantize=arguments.quantize, packed_dir=arguments.packed_dir)
    model = load_parts(arguments.model, config, None, None).model
    write_masks(model)
    batch, blocks = arguments.batch, CONTEXT // BLOCK + 1
    cache = model.new_cache(batch * blocks, BLOCK)
    rng = random.Random(1)
    rows = {
        "none": no_masks(batch),
        "mixed halves": torch.arange(batch).int() % 4,
        "full masks": torch.full((batch,), 4).int(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds + 3):
        tokens = torch.tensor([rng.randrange(2, model.config.vocab_size) for _ in range(batch)])
        for name in rng.sample(sorted(rows), len(rows)):
            slots = torch.arange(batch) * blocks * BLOCK + CONTEXT
            step = Batch(
                token_ids=tokens,
                positions=torch.full((batch,), CONTEXT, dtype=torch.int32),
                slots=slots,
                sequence_rows=torch.arange(batch, dtype=torch.int32),
                block_tables=torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks),
                logit_rows=torch.arange(batch),
                mask_rows=rows[name],
            )
            start = time.perf_counter()
            meter = None if name == "none" else RouteMeter.zeros(batch, model.device)
            model.forward(step, cache, meter)
            seconds[name].append(time.perf_counter() - start)
    result = {
        name: {
            "step_ms": summary([1e3 * value for value in values[3:]]),
            "to_none": summary([mine / none for mine, none in zip(values, seconds["none"], strict=True)][3:]),
        }
        for name, values in seconds.items()
    }
    for name, row in result.items():
        step_ms, ratio = row["step_ms"]["median"], row["to_none"]["median"]
        print(f"{name:<14} {step_ms:7.2f} ms, {ratio:.3f} of a step without masks")
    name = f"mask_cost-{arguments.quantize}"
    print(
        "saved", save(name, {"machine": machine(), "batch": batch, "quantize": arguments.quantize, **result})
    )


if __name__ == "__main__":
    main()
