"""Measured tiles: which are chosen, that they change no bit, and who may have written the folder they are in.

The model's weights are on torch's "meta" device, which has shapes and no numbers. In place of products run
functions that answer with the tile they would take, and in place of a GPU's clock one that looks at it.
"""

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from kernels.triton.device_weights import (  # noqa: E402
    BF16,
    exact_values,
    random_experts,
    random_matrix,
    random_routing,
    use_exact_dot,
)
from world import tiny_checkpoint  # noqa: E402

from moe_runtime import autotune as module  # noqa: E402
from moe_runtime.autotune import FILE, autotune  # noqa: E402
from moe_runtime.errors import ConfigError  # noqa: E402
from moe_runtime.kernels import choose  # noqa: E402
from moe_runtime.kernels.triton import fused_moe, linear  # noqa: E402
from moe_runtime.kernels.triton.tiles import TUNED_SIZES, Choice, candidates, tuned_size  # noqa: E402
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceLinear  # noqa: E402
from moe_runtime.layers.decoder import Decoder  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402

MOST_TOKENS = 30  # sizes 16 and 64 of dense layers and experts (top 2)
CHIP = "Some GPU | triton 3"


@pytest.fixture
def model(tmp_path: Path, no_products: None) -> Decoder:
    """Dense layers of four shapes (two attention projections, the head) and a mixture, each in two layers."""
    return load_model(tiny_checkpoint(tmp_path / "model"), choose("triton", device=torch.device("meta")))


def tuned(model: Decoder) -> tuple[dict[int, Choice], dict[int, Choice]]:
    """Of the first layer's experts and of the head."""
    return model.blocks[0].mlp.experts.packed.tuned, model.head.packed.matrix.tuned


@pytest.fixture
def no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def expert_rows(
        x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, experts: DeviceExperts
    ) -> object:
        assert ids.shape == shares.shape and len(ids) == len(x) and ids.shape[1] == 2
        return "experts", experts.tuned.get(tuned_size(ids.numel()))

    def product(x: torch.Tensor, packed: DeviceLinear) -> object:
        assert x.shape[1] == packed.in_features
        return "linear", packed.matrix.tuned.get(tuned_size(len(x)))

    monkeypatch.setattr(fused_moe, "expert_rows", expert_rows)
    monkeypatch.setattr(linear, "linear", product)


@dataclass
class Clock:
    """Seconds by operation and choice, which all calls must have in common; ``asked`` counts."""

    seconds: Callable[[str, Choice | None], float | None]
    asked: int = 0

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> float | None:
        self.asked += 1
        (made,) = {call() for call in calls}
        return self.seconds(*made)


def deep_is_fast(operation: str, choice: Choice | None) -> float | None:
    """The experts' deepest pipeline wins, but there is no room for more than 3 stages."""
    if operation == "linear" or choice is None:
        return 1.0
    return None if choice[0].num_stages > 3 else 1.0 / choice[0].num_stages


def test_the_fastest_that_fits_is_chosen_kept_and_not_measured_again(model: Decoder, tmp_path: Path) -> None:
    clock, folder = Clock(deep_is_fast), tmp_path / "tiles"
    assert autotune(model, folder, MOST_TOKENS, clock, CHIP) > 0
    experts, head = tuned(model)
    assert set(experts) == {16, 64} and not head
    assert all(tile.num_stages == 3 for tile, _ in experts.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    chosen, asked = dict(experts), clock.asked
    experts.clear()
    assert autotune(model, folder, MOST_TOKENS, clock, CHIP) == 0 and clock.asked == asked
    assert experts == chosen and not head
    assert model.blocks[1].mlp.experts.packed.tuned == chosen
    assert autotune(model, folder, MOST_TOKENS, clock, "Another GPU | triton 3") > 0


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    on_the_cpu = load_model(tiny_checkpoint(tmp_path / "model"), choose("reference"))
    assert autotune(on_the_cpu, tmp_path / "tiles", MOST_TOKENS) == 0
    assert "no GPU to measure" in caplog.text and not (tmp_path / "tiles").exists()


def test_noise_is_no_reason_to_change(model: Decoder, tmp_path: Path) -> None:
    clock = Clock(lambda operation, choice: 1.0 if choice is None else 0.98)
    autotune(model, tmp_path, MOST_TOKENS, clock, CHIP)
    entries = json.loads((tmp_path / FILE).read_text())
    assert tuned(model) == ({}, {}) and all(entry["tile"] is None for entry in entries.values())
    assert any("| experts | float32 | 8 x 16 x 32 | 64" in key for key in entries)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"x": 1}', b"[" * 100_000, b" " * (module.MAX_FILE_BYTES + 1)]
)
def test_a_damaged_file_is_replaced(model: Decoder, tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert autotune(model, tmp_path, MOST_TOKENS, Clock(deep_is_fast), CHIP) > 0
    assert json.loads((tmp_path / FILE).read_text())


@pytest.mark.parametrize(
    "wrong",
    [{"tile": {"rows": 1 << 20}}, {"tile": "large"}, {}, None, {"tile": {"tokens": 16, "split": False}}],
)
def test_entries_that_no_measurement_could_have_made_are_measured_again(
    model: Decoder, tmp_path: Path, wrong: object
) -> None:
    clock = Clock(deep_is_fast)
    autotune(model, tmp_path, MOST_TOKENS, clock, CHIP)
    right = json.loads((tmp_path / FILE).read_text())
    key = next(key for key in right if "experts" in key)
    (tmp_path / FILE).write_text(json.dumps({**right, key: wrong}))
    assert autotune(model, tmp_path, MOST_TOKENS, clock, CHIP) == 1
    assert json.loads((tmp_path / FILE).read_text()) == right


def test_what_others_can_write_to_is_refused(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clock = tmp_path / "tiles", Clock(deep_is_fast)
    for mode in (0o770, 0o707):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        with pytest.raises(
            ConfigError, match=rf"--autotune-dir .*tiles can be written by others \(mode {mode:o}"
        ):
            autotune(model, folder, MOST_TOKENS, clock, CHIP)
    folder.chmod(0o700)
    (folder / FILE).write_text("{}")
    (folder / FILE).chmod(0o666)
    with pytest.raises(ConfigError, match="the file can be written by others"):
        autotune(model, folder, MOST_TOKENS, clock, CHIP)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        autotune(model, folder, MOST_TOKENS, clock, CHIP)
    if os.geteuid() == 0:
        os.chown(folder, 54321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(ConfigError, match="belongs to user"):
        autotune(model, folder, MOST_TOKENS, clock, CHIP)
    (tmp_path / "plain").write_text("")
    with pytest.raises(ConfigError, match="--autotune-dir .*plain.*choose a folder of your own"):
        autotune(model, tmp_path / "plain", MOST_TOKENS, clock, CHIP)
    assert clock.asked == 0


def test_sizes_name_the_next_larger_measurement() -> None:
    assert [tuned_size(count) for count in (1, 16, 17, 64, 65, 4096, 99999)] == [
        16,
        16,
        64,
        64,
        256,
        4096,
        4096,
    ]
    for kind in ("bfloat16", "int4", "float32"):
        for size in TUNED_SIZES:
            assert all(tile.tokens <= size and tile.num_stages >= 2 for tile in candidates(kind, size))


def test_a_measured_tile_is_used_and_changes_no_bit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_dot(monkeypatch, device)
    packed = DeviceLinear(random_matrix(1, 20, 512, BF16, device))
    experts, (ids, weights) = random_experts(4, 64, 32, BF16, device), random_routing(9, 4, 2, device)
    x, rows = exact_values(17, 512).to(device), exact_values(9, 64).to(device)
    before = linear.linear(x, packed), fused_moe.expert_rows(rows, ids, weights, experts)
    largest = candidates("bfloat16", 64)[-1]
    packed.matrix.tuned[64], experts.tuned[64] = (largest, True), (replace(largest, num_stages=2), False)
    for file, name in ((linear, "linear_tile"), (fused_moe, "expert_tile")):
        monkeypatch.setattr(file, name, lambda *_: pytest.fail("not what was measured"))
    after = linear.linear(x, packed), fused_moe.expert_rows(rows, ids, weights, experts)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
