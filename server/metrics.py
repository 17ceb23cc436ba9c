"""Prometheus metrics, under vLLM's names where vLLM has one, so that dashboards made for it work here.

Gauges and counters of the engine are read from ``AsyncEngine.stats`` at each scrape and kept nowhere else;
the histograms are filled by generation.py. One registry per app; no label holds anything a client wrote.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_runtime.engine import EngineStats
from moe_runtime.server.scenario_metrics import ScenarioMetrics

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STATUS_CLASSES = ("2xx", "3xx", "4xx", "5xx", "gone")

# name, field of EngineStats, help
ENGINE_GAUGES = (
    ("vllm:num_requests_running", "num_running", "sequences that hold cache blocks now"),
    ("vllm:num_requests_waiting", "num_waiting", "sequences that wait for a place"),
    ("moe_cache_blocks", "num_blocks", "blocks of the key-value cache"),
    ("moe_cache_blocks_free", "num_free_blocks", "blocks free to take"),
)
ENGINE_COUNTERS = (
    ("vllm:prompt_tokens", "prompt_tokens", "prompt tokens of admitted sequences, cached ones included"),
    ("vllm:generation_tokens", "generation_tokens", "tokens generated"),
    ("vllm:num_preemptions", "preemptions", "sequences that gave their blocks back and were computed again"),
    ("vllm:prefix_cache_queries", "prefix_query_tokens", "prompt tokens looked up in the prefix cache"),
    ("vllm:prefix_cache_hits", "prefix_hit_tokens", "prompt tokens found there"),
    ("moe_computed_tokens", "computed_tokens", "tokens sent through the model, recomputed ones included"),
    ("moe_engine_steps", "steps", "steps of the engine"),
    ("moe_dispatches_outside_mask", "outside_mask", "experts used against a scenario's mask: must stay 0"),
)
FINISH_REASONS = ("stop", "length", "error", "abort", "drift")


class Metrics:
    """The app's registry. ``observe_*`` are called on the event loop."""

    def __init__(self, model_name: str, read_stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.http_responses = dict.fromkeys(STATUS_CLASSES, 0)
        self.registry.register(_EngineCollector(model_name, read_stats, self.http_responses))
        self.scenarios = ScenarioMetrics(self.registry, model_name)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, help, ["model_name"], registry=self.registry, buckets=buckets)
            return family.labels(model_name=model_name)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "from admission to the first token", SECONDS
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "between two tokens of one answer", SECONDS
        )
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "mean per answer, first token left out", SECONDS
        )
        self.request_latency = histogram(
            "vllm:e2e_request_latency_seconds", "from admission to the last token", SECONDS
        )
        self.request_prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "prompt tokens per request", TOKENS
        )
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "generated tokens per request", TOKENS
        )

    def observe_response(self, status: int | None) -> None:
        """Count one HTTP response; None: the client left before it had one."""
        kind = "gone" if status is None else f"{status // 100}xx"
        if kind in self.http_responses:
            self.http_responses[kind] += 1

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(
        self, model_name: str, read_stats: Callable[[], EngineStats], http_responses: dict[str, int]
    ) -> None:
        self.model_name = model_name
        self.read_stats = read_stats
        self.http_responses = http_responses

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask an engine that has not started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self.read_stats()
        label, value = ["model_name"], [self.model_name]
        for name, field, help in ENGINE_GAUGES:
            gauge = GaugeMetricFamily(name, help, labels=label)
            gauge.add_metric(value, getattr(stats, field))
            yield gauge
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        gauge = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "share of the cache in use, 0 to 1", labels=label
        )
        gauge.add_metric(value, used)
        yield gauge
        for name, field, help in ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, help, labels=label)
            counter.add_metric(value, getattr(stats, field))
            yield counter
        counter = CounterMetricFamily(
            "vllm:request_success", "finished choices", labels=["model_name", "finished_reason"]
        )
        for reason in FINISH_REASONS:
            counter.add_metric([self.model_name, reason], getattr(stats, f"finished_{reason}"))
        yield counter
        counter = CounterMetricFamily("moe_http_responses", "HTTP responses", labels=["status"])
        for status, count in self.http_responses.items():
            counter.add_metric([status], count)
        yield counter
