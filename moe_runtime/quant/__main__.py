"""What each format costs on a model: `python -m moe_runtime.quant --model DIR`. A table on stdout, JSON with
--json.

The KL divergence and the agreement of the likeliest token compare whole models on the same text as
--max-quant-kl (quality.py), with the kernels that will serve. The weight error is |dequantised - weight| /
|weight| over a sample of the quantised matrices.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_runtime import kernels, loader
from moe_runtime.checkpoint import Checkpoint
from moe_runtime.config import EngineConfig
from moe_runtime.device import choose_device, told_as_config_errors, use
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.kernels import Kernels
from moe_runtime.layers.decoder import Decoder
from moe_runtime.quant.quality import compare, log_probabilities, require_full_precision, text_ids
from moe_runtime.quant.recipe import Recipe
from moe_runtime.quant.rounding import quantize
from moe_runtime.quant.statistics import load_moments
from moe_runtime.tokenizer import Tokenizer

SAMPLE = 48  # matrices looked at for the weight error
MIXED = "experts=int4,attention=int8,lm_head=int8"
CHOICES = (
    EngineConfig(quantize="int8"),
    EngineConfig(quantize=MIXED),
    *(
        EngineConfig(quantize="int4", quantize_group=group, quantize_zeros=zeros)
        for group in (32, 64, 128)
        for zeros in (False, True)
    ),
)


def measure(model_dir: Path, chosen: Kernels, statistics: Path | None) -> list[dict[str, Any]]:
    """One row per choice of formats, the full model first; models are loaded one after the other."""
    tokenizer = Tokenizer.load(model_dir)
    _, config = loader.read_model_config(model_dir, "float32")  # whatever the dtype is
    require_full_precision(config, "this table", "name the checkpoint it was made from with --model")
    texts = text_ids(model_dir, tokenizer)
    moments = {} if statistics is None else load_moments(statistics, model_dir)
    model = loader.load_model(model_dir, chosen)
    full, full_bytes, dtype = log_probabilities(model, texts), model.config.weight_bytes, model.config.dtype
    rows: list[dict[str, Any]] = [{"format": dtype, "weight_bytes": full_bytes}]
    del model
    for choice in CHOICES:
        recipe = Recipe(Recipe.of(choice).formats, moments)
        model = loader.load_model(model_dir, chosen, recipe)
        divergence = asdict(compare(full, log_probabilities(model, texts)))
        error = _weight_error(model, model_dir, recipe)
        row = {"format": recipe.label, "weight_bytes": model.config.weight_bytes, **divergence}
        rows.append({**row, "weight_error": error})
        del model
    return rows


def _weight_error(model: Decoder, model_dir: Path, recipe: Recipe) -> float:
    checkpoint = Checkpoint(model_dir)
    slots = [slot for slot in model.slots() if slot.part in recipe.formats and slot.matrices is None]
    difference = total = 0.0
    for slot in slots[:: max(1, len(slots) // SAMPLE)]:
        entry = checkpoint.entries.get(slot.name)
        if entry is None or entry.dtype not in ("F32", "BF16", "F16") or slot.part is None:
            continue
        weight = checkpoint.read(entry).float()
        made = quantize(weight, recipe.formats[slot.part], recipe.moments.get(slot.name)).dequantize()
        difference += float((made - weight).square().sum())
        total += float(weight.square().sum())
    return (difference / total) ** 0.5 if total else 0.0


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| weights | size | KL, nats | largest KL | same likeliest token | weight error |"
    yield "|---|---|---|---|---|---|"
    full = rows[0]["weight_bytes"]
    for row in rows:
        size = f"{row['weight_bytes'] / 1e6:,.1f} MB ({row['weight_bytes'] / full:.1%})"
        if "kl" not in row:
            yield f"| {row['format']} | {size} | | | | |"
            continue
        yield (
            f"| {row['format']} | {size} | {row['kl']:.5f} | {row['largest_kl']:.3f} | {row['top1']:.1%} | "
            f"{row['weight_error']:.4f} |"
        )


def main(argv: list[str] | None = None) -> int:
    """The command's exit status: 0, or 2 for a wrong flag or folder."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_runtime.quant", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quantize-statistics", type=Path, metavar="FILE", help="from quant.statistics")
    parser.add_argument("--backend", choices=("auto", "cpu", "reference", "triton"), default="auto")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto, as moe-serve's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args(argv)
    try:
        place = choose_device(arguments.device, arguments.backend)
        use(place.device)
        chosen = kernels.choose(arguments.backend, device=place.device)
        with told_as_config_errors(chosen.device):
            rows = measure(arguments.model, chosen, arguments.quantize_statistics)
    except MoeRuntimeError as error:
        print(f"moe_runtime.quant: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    if arguments.json is not None:
        result = {
            "model": arguments.model.resolve().name,
            "backend": chosen.backend,
            "device": str(chosen.device),
            "torch": torch.__version__,
            "weighted": arguments.quantize_statistics is not None,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
