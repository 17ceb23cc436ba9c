"""What is counted by scenario. Labels are names of the operator's folders, never what a client wrote."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LOST_MASS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class ScenarioMetrics:
    """Used on the event loop only."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        labels = ["model_name", "scenario"]
        self._requests = Counter(
            "moe_scenario_requests", "prompts answered or refused under a scenario", labels, registry=registry
        )
        self._prompt_tokens = Counter(
            "moe_scenario_prompt_tokens", "their tokens, cached ones included", labels, registry=registry
        )
        self._generation_tokens = Counter(
            "moe_scenario_generation_tokens", "tokens generated for them", labels, registry=registry
        )
        self._lost_mass = Histogram(
            "moe_scenario_lost_mass",
            "part of a prompt's gate weight that belongs to experts outside the scenario, 0 to 1",
            labels,
            registry=registry,
            buckets=LOST_MASS,
        )
        self._drifted = Counter(
            "moe_scenario_drifted",
            "prompts above their scenario's threshold of lost mass, by what was done",
            [*labels, "action"],
            registry=registry,
        )
        self._log_failures = Counter(
            "moe_drift_log_failures", "lines that could not be written to --drift-log", registry=registry
        )
        self._served = Gauge("moe_scenarios_served", "scenarios that take requests", registry=registry)
        self._resident = Gauge(
            "moe_experts_resident", "routed experts in memory, all layers", registry=registry
        )
        self._experts = Gauge("moe_experts", "routed experts the model has, all layers", registry=registry)
        self._bytes = Gauge("moe_expert_bytes", "what the experts in memory take", registry=registry)

    def prompt_read(self, scenario: str, num_tokens: int, lost_mass: float | None, drift: str | None) -> None:
        """One prompt has its first token, or is refused."""
        labels = (self._model_name, scenario)
        self._requests.labels(*labels).inc()
        self._prompt_tokens.labels(*labels).inc(num_tokens)
        if lost_mass is not None:
            self._lost_mass.labels(*labels).observe(lost_mass)
        if drift is not None:
            self._drifted.labels(*labels, drift).inc()

    def generated(self, scenario: str, num_tokens: int) -> None:
        self._generation_tokens.labels(self._model_name, scenario).inc(num_tokens)

    def log_failed(self) -> None:
        self._log_failures.inc()

    def holds(self, num_scenarios: int, resident: int, experts: int, num_bytes: int) -> None:
        """What the server has from now on."""
        for gauge, value in (
            (self._served, num_scenarios),
            (self._resident, resident),
            (self._experts, experts),
            (self._bytes, num_bytes),
        ):
            gauge.set(value)
