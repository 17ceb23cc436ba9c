"""Captured decode steps over a model whose logits are its batch: shapes, memory, a device that cannot."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.batch import Batch, no_masks
from moe_runtime.config import EngineConfig
from moe_runtime.graph_recorder import DeviceRecorder, recorder_for
from moe_runtime.graphs import DecodeGraphs, PlainSteps, batch_sizes, choose_steps, table_widths
from moe_runtime.kernels import RouteMeter

VOCAB = 11


@dataclass
class Rerun:
    """A recorder whose graphs are the captured calls. ``limit``: a larger batch finds no memory."""

    limit: int = 1 << 30
    fault: Exception | None = None
    recorded: int = 0
    alive: int = 0  # of the recorded
    most_alive: int = 0
    replayed: int = 0
    settled: int = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        if self.fault is not None:
            raise self.fault
        self.recorded += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)

        def replay() -> None:
            self.replayed += 1
            run()

        weakref.finalize(replay, self._die)
        return replay

    def _die(self) -> None:
        self.alive -= 1

    def free_bytes(self) -> int:
        return (10 - self.recorded) << 20

    def settle(self) -> None:
        self.settled += 1


@dataclass
class Echo:
    """Logits [R, V]: the token, its position, slot, mask row and the sum of its blocks. No experts."""

    recorder: Rerun = field(default_factory=Rerun)
    device: torch.device = torch.device("cpu")
    config: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=VOCAB))
    sizes: list[tuple[int, int]] = field(default_factory=list)
    moves: int = 0

    def mixtures(self) -> Any:
        return iter(())

    def forward(self, batch: Batch, cache: Any, meter: RouteMeter | None = None) -> torch.Tensor:
        self.sizes.append((len(batch.token_ids), batch.block_tables.shape[1]))
        if len(batch.token_ids) > self.recorder.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        rows = batch.logit_rows
        told = (batch.token_ids, batch.positions, batch.slots, batch.mask_rows)
        logits = torch.zeros(len(rows), VOCAB)
        for column, part in enumerate(told):
            logits[:, column] = part[rows].float()
        tables = batch.block_tables[batch.sequence_rows.long()].sum(1)
        logits[:, len(told)] = tables[rows].float()
        if meter is not None and meter.lost is not None:
            meter.lost.add_(batch.token_ids.float())
            meter.outside.add_(int((batch.mask_rows >= 0).sum()))
        return logits


def decode(num_tokens: int, blocks: int = 1, mask_rows: torch.Tensor | None = None) -> Batch:
    rows = torch.arange(num_tokens)
    return Batch(
        rows + 3, rows.int() * 7, rows * 16, rows.int(),
        torch.arange(num_tokens * blocks).int().view(-1, blocks), rows,
        no_masks(num_tokens) if mask_rows is None else mask_rows,
    )  # fmt: skip


def graphs(model: Echo, max_batch: int = 16, max_blocks: int = 600) -> DecodeGraphs:
    return DecodeGraphs(model, None, model.recorder, max_batch, block_size=16, max_blocks=max_blocks)


def test_batch_sizes_grow_by_eighths_and_end_with_the_largest() -> None:
    assert list(batch_sizes(1)) == [1]
    assert list(batch_sizes(20)) == [1, 2, 4, 8, 16, 20]
    assert list(batch_sizes(64)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert list(batch_sizes(256))[-10:] == [120, 128, 144, 160, 176, 192, 208, 224, 240, 256]
    assert list(table_widths(100, 16)) == [100]
    assert list(table_widths(2560, 16)) == [256, 1024, 2560]
    assert list(table_widths(3, 8192)) == [1, 3]


def test_a_decode_step_is_padded_and_replayed_with_the_logits_of_the_plain_one() -> None:
    model = Echo()
    steps, plain = graphs(model), Echo()
    steps.prepare()
    assert model.sizes == [(size, 256) for size in (16, 8, 4, 2, 1)] and model.recorder.recorded == 5
    for num_tokens, blocks, padded in (
        (3, 1, (4, 256)),
        (16, 256, (16, 256)),
        (1, 257, (1, 600)),
        (5, 2, (8, 256)),
    ):
        batch = decode(num_tokens, blocks, torch.arange(num_tokens).int() % 3 - 1)
        assert torch.equal(steps.forward(batch), plain.forward(batch, None))
        assert model.sizes[-1] == padded
    assert (model.recorder.recorded, model.recorder.replayed) == (6, 4)


def test_what_is_captured_later_says_so(caplog: pytest.LogCaptureFixture) -> None:
    steps = graphs(Echo())
    with caplog.at_level(logging.INFO, "moe_runtime.graphs"):
        steps.forward(decode(3, 300), RouteMeter.zeros(3, torch.device("cpu")))
        steps.forward(decode(4, 300), RouteMeter.zeros(4, torch.device("cpu")))
    told = "captured decode steps of 4 sequences of 600 blocks with scenarios in 1 MiB"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_other_steps_and_larger_ones_go_as_they_are() -> None:
    model = Echo()
    steps = graphs(model, max_batch=4, max_blocks=8)
    one = torch.zeros(3, dtype=torch.int32)
    chunk = replace(decode(3), sequence_rows=one, block_tables=one[None], logit_rows=torch.tensor([2]))
    silent = replace(decode(3), logit_rows=torch.tensor([1, 2]))
    for batch in (chunk, silent, decode(5), decode(2, blocks=9)):
        sizes = (len(batch.token_ids), batch.block_tables.shape[1])
        logits = steps.forward(batch)
        assert model.sizes[-1] == sizes and len(logits) == len(batch.logit_rows)
    assert model.recorder.recorded == 0


def test_a_meter_gets_its_rows_and_what_it_had() -> None:
    model = Echo()
    steps = graphs(model)
    for _ in range(2):  # captured, then replayed
        meter = RouteMeter(torch.ones(3), torch.tensor([5]))
        steps.forward(decode(3, mask_rows=torch.tensor([0, -1, 1], dtype=torch.int32)), meter)
        assert meter.lost is not None
        assert meter.lost.tolist() == [4.0, 5.0, 6.0] and meter.outside.tolist() == [7]
    steps.forward(decode(3))
    assert (model.recorder.recorded, model.recorder.replayed) == (2, 3)


def test_what_finds_no_memory_goes_kernel_by_kernel_and_smaller_steps_are_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Echo(Rerun(limit=4))
    steps = graphs(model, max_batch=8)
    with caplog.at_level(logging.INFO, "moe_runtime.graphs"):
        steps.prepare()
    assert model.recorder.recorded == 3 and model.recorder.settled == 1
    assert "step of 8 sequences could not be captured (CUDA out of memory. Tried to allocate)" in caplog.text
    assert "captured decode steps of 1, 2, 4 sequences" in caplog.text and "and 3 MiB" in caplog.text
    model.recorder.limit = 100
    assert torch.equal(steps.forward(decode(7)), Echo().forward(decode(7), None))
    assert model.sizes[-1] == (7, 1)


def test_a_driver_that_cannot_capture_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Echo(Rerun(fault=torch.AcceleratorError("CUDA error: operation not permitted\nCompile with")))
    steps = graphs(model)
    steps.prepare()
    assert len(model.sizes) == 1 and model.recorder.settled == 1
    assert "(CUDA error: operation not permitted); all new ones are launched kernel by kernel" in caplog.text
    assert torch.equal(steps.forward(decode(2)), Echo().forward(decode(2), None))


def test_what_moved_is_captured_anew_when_it_is_needed() -> None:
    model = Echo()
    steps = graphs(model)
    for moves, captured in ((0, 1), (0, 1), (1, 2), (1, 2), (2, 3)):
        model.moves = moves
        assert torch.equal(steps.forward(decode(2)), Echo().forward(decode(2), None))
        assert model.recorder.recorded == captured and len(steps._replays) == 1
    assert model.recorder.most_alive == 1  # a stale graph does not hold memory beside the new one


def test_what_moved_before_the_first_request_is_prepared_again_and_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Echo()
    steps = graphs(model)
    steps.prepare()
    steps.prepare()
    assert model.recorder.recorded == 5
    model.moves += 1  # scenarios were added
    model.sizes.clear()
    with caplog.at_level(logging.INFO, "moe_runtime.graphs"):
        steps.prepare()
        steps.prepare()
    assert model.sizes == [(size, 256) for size in (16, 8, 4, 2, 1)]
    assert len(caplog.messages) == 1 and "captured decode steps of 1, 2, 4, 8, 16 seq" in caplog.text
    for num_tokens in (1, 3, 16):
        assert torch.equal(steps.forward(decode(num_tokens)), Echo().forward(decode(num_tokens), None))
    recorder = model.recorder
    assert (recorder.recorded, recorder.replayed, recorder.alive, recorder.most_alive) == (10, 3, 5, 5)


def test_a_device_that_is_lost_while_capturing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo(Rerun(fault=torch.AcceleratorError("CUDA error: capture")))
    monkeypatch.setattr(model.recorder, "settle", lost)
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        graphs(model).prepare()


def lost() -> None:
    raise torch.AcceleratorError("CUDA error: illegal memory access")


def test_the_largest_step_is_rehearsed_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    monkeypatch.setattr("moe_runtime.graphs.recorder_for", lambda _: model.recorder)
    limits = {"max_context": 64, "max_logit_rows": 5}
    config = EngineConfig(max_batch_tokens=40, max_running=2)
    assert isinstance(choose_steps(model, None, config, **limits), DecodeGraphs)
    assert model.sizes == [(40, 4), (2, 4), (1, 4)]
    without = EngineConfig(max_batch_tokens=40, graphs=False)
    assert isinstance(choose_steps(model, None, without, **limits), PlainSteps)
    model.recorder.limit = 39
    with pytest.raises(torch.OutOfMemoryError):
        choose_steps(model, None, config, **limits)


def test_on_the_cpu_there_is_nothing_to_capture() -> None:
    assert recorder_for(torch.device("cpu")) is None
    model = Echo()
    steps = choose_steps(model, None, EngineConfig(), max_context=64, max_logit_rows=1)
    steps.prepare()
    assert isinstance(steps, PlainSteps) and not model.sizes
    assert torch.equal(steps.forward(decode(2)), model.forward(decode(2), None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_repeats_what_was_recorded() -> None:
    device = torch.device("cuda", 0)
    recorder, numbers, sums = (
        DeviceRecorder(device),
        torch.ones(4, device=device),
        torch.zeros(4, device=device),
    )
    replay = recorder.record(lambda: sums.add_(numbers * 2))
    numbers.fill_(10)
    replay()
    assert sums.tolist() == [22.0] * 4 and recorder.free_bytes() > 0
    del replay  # the only graph, so that the shared pool is empty
    replay = recorder.record(lambda: sums.add_(numbers * 3))
    sums.zero_()
    replay()
    assert sums.tolist() == [30.0] * 4
