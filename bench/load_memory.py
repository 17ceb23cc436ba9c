"""What does loading cost? `python bench/load_memory.py DIR`: peak RSS against weight bytes, and seconds.

The model is loaded in a fresh process; its peak (VmHWM) less what the process held after its imports is
compared with the bytes of the checkpoint's tensors.
"""

import argparse
import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from pathlib import Path

from common import machine, save  # type: ignore[import-not-found]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _load(folder: Path, pipe: Connection) -> None:
    from moe_runtime import kernels, loader

    chosen = kernels.choose("auto")
    before = _status("VmRSS")
    start = time.perf_counter()
    model = loader.load_model(folder, chosen)
    pipe.send(
        (
            time.perf_counter() - start,
            _status("VmHWM") - before,
            _status("VmRSS") - before,
            model.config.model_type,
        )
    )


def main() -> None:
    """Load once in a child, print and save the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_load, args=(folder, theirs))
    child.start()
    seconds, peak, resident, model_type = ours.recv()
    child.join()
    # Headers are a few kilobytes: file sizes are the tensor bytes to within a thousandth.
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{model_type}: weights {weights / 1e9:.3f} GB, loaded in {seconds:.1f} s")
    print(f"peak RSS {peak / 1e9:.3f} GB = {peak / weights:.3f} of the weights; then {resident / 1e9:.3f} GB")
    result = {"weight_bytes": weights, "peak_rss_bytes": peak, "ratio": peak / weights, "seconds": seconds}
    print("saved", save("load_memory", {"machine": machine(), **result}))


if __name__ == "__main__":
    main()
