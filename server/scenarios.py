"""Which scenarios this server answers for: from a client's ``model`` to the mask that its tokens obey."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moe_runtime.errors import ConfigError, ModelNotFound, PlanError, ScenarioUnavailable
from moe_runtime.experts.exported import Exported, open_exported
from moe_runtime.experts.file_digests import DigestMemo
from moe_runtime.experts.registry import Registry, Scenario, placement_of, scenario_folder
from moe_runtime.experts.rehearsal import Rehearsal
from moe_runtime.server.settings import ServerConfig

State = Literal["serving", "leaving", "joining"]
logger = logging.getLogger("moe_runtime.server")


class Scenarios:
    """A table of names. Belongs to the event loop; what the engine obeys is its own mask table.

    full      whether the model without a scenario is offered: all its experts are in memory
    exported  the model itself, if it is what a scenario left of another one, whose router it still has
    refused   scenarios of the folder that may not be served, and why
    registry  where more can be found; None for a model without a folder of scenarios
    """

    def __init__(
        self,
        serving: Iterable[Scenario] = (),
        *,
        full: bool = True,
        refused: Mapping[str, str] | None = None,
        registry: Registry | None = None,
        exported: Exported | None = None,
    ) -> None:
        self.full = full
        self.exported = exported
        self.refused = dict(refused or {})
        self.registry = registry
        self._scenarios = {scenario.name: scenario for scenario in serving}
        self._leaving: set[str] = set()
        self._joining: set[str] = set()
        self.changing = asyncio.Lock()  # one change of the engine's experts at a time
        self._changes: set[asyncio.Task[None]] = set()

    def resolve(self, base: str, model: str) -> Scenario | None:
        """The scenario of ``model``, None for ``base`` itself. Raises ModelNotFound, and ScenarioUnavailable
        for one that is being added or taken away.
        """
        if model == base and self.exported is not None:
            return self.exported.scenario
        if model == base and self.full:
            return None
        prefix, _, name = model.rpartition(":")
        if prefix == base and name in self._joining:
            raise ScenarioUnavailable(f"the scenario '{name}' is being added to this server; try again")
        scenario = self._scenarios.get(name) if prefix == base else None
        if scenario is None:
            raise ModelNotFound(self._unknown(base, model))
        if name in self._leaving:
            raise ScenarioUnavailable(
                f"the scenario '{name}' is being taken away from this server; ask another server or try later"
            )
        return scenario

    @property
    def come_and_go(self) -> bool:
        """Whether experts join and leave with them."""
        return not self.full and self.exported is None

    def __len__(self) -> int:
        return len(self._scenarios) - len(self._leaving)

    def __contains__(self, name: str) -> bool:
        return name in self._scenarios or name in self._joining

    def __iter__(self) -> Iterator[Scenario]:
        """By name, those that leave included."""
        return iter([self._scenarios[name] for name in sorted(self._scenarios)])

    def state(self, name: str) -> State:
        """Of one that is here."""
        return "leaving" if name in self._leaving else "joining" if name in self._joining else "serving"

    def begin(self, change: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Let a change go on to its end, whoever waits for it; its failure is also logged."""
        task = asyncio.get_running_loop().create_task(change)
        self._changes.add(task)  # the loop alone would not keep it
        task.add_done_callback(self._changes.discard)
        task.add_done_callback(_log_failure)
        return task

    @contextmanager
    def joining(self, name: str) -> Iterator[None]:
        """Within, requests for it are asked to come back."""
        self._joining.add(name)
        try:
            yield
        finally:
            self._joining.discard(name)

    def add(self, scenario: Scenario) -> None:
        """The engine obeys its mask from now on."""
        self._scenarios[scenario.name] = scenario
        self.refused.pop(scenario.name, None)

    def leave(self, name: str) -> None:
        """Refuse new requests for it; the running ones go on."""
        self._leaving.add(name)

    def forget(self, name: str) -> None:
        """It has left."""
        self._leaving.discard(name)
        self._scenarios.pop(name, None)

    def cards(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """OpenAI's model objects: ``base``, if it is offered, and every scenario with what it costs."""
        own = [dict(base)] if self.full else []
        if self.exported is not None:
            own = [{**base, "scenario": self._told(self.exported.scenario)}]
        return own + [
            {
                **base,
                "id": f"{base['id']}:{scenario.name}",
                "parent": base["id"],
                "scenario": self._told(scenario),
            }
            for scenario in self._named()
        ]

    def _told(self, scenario: Scenario) -> dict[str, Any]:
        return {"name": scenario.name, "state": self.state(scenario.name), **scenario.summary()}

    def _named(self) -> list[Scenario]:
        """Those with a name of their own."""
        return [] if self.exported is not None else list(self)

    def _unknown(self, base: str, model: str) -> str:
        itself = self.full or self.exported is not None
        offered = ([base] if itself else []) + [f"{base}:{scenario.name}" for scenario in self._named()]
        there = ", ".join(f"'{name}'" for name in offered)
        if model == base:
            return (
                f"The model '{base}' is not offered without a scenario: this server was started with "
                f"--scenarios and holds their experts alone; it has {there}."
            )
        reason = self.refused.get(model.removeprefix(f"{base}:"))
        why = f" ({reason})" if reason else ""
        return f"The model '{model[:128]}' does not exist{why}; this server has {there}."


def open_scenarios(model_dir: Path, config: ServerConfig, memo: DigestMemo | None = None) -> Scenarios:
    """What the server starts with; ``memo`` may know the model's files. Those of --scenarios must all be
    right: PlanError or ConfigError says what is not. Of a whole folder the others are served, and the log
    says which is refused and why.
    """
    wanted = [name.strip() for name in config.scenarios.split(",")] if config.scenarios else []
    folder = scenario_folder(model_dir, config.scenario_dir)
    if folder is None:
        if wanted:
            raise ConfigError(
                f"--scenarios {config.scenarios}: the model has no folder of scenarios; name it with "
                "--scenario-dir"
            )
        return _open_exported(model_dir)
    registry = Registry(folder, model_dir, allow_uncertified=config.allow_uncertified, memo=memo)
    known = registry.names()
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--scenarios: there is no {name!r}; there are: {', '.join(known) or 'none'}")
        if wanted.count(name) > 1:
            raise ConfigError(f"--scenarios: {name!r} is named twice")
    if wanted:
        serving = [registry.open(name) for name in wanted]
        rehearsal = Rehearsal(model_dir, placement_of(serving))
        for scenario in serving:
            rehearsal.add(scenario)
        return Scenarios(_warned(serving), full=False, registry=registry)
    rehearsal, serving, refused = Rehearsal(model_dir), [], {}
    for name in known:
        try:
            scenario = registry.open(name)
            rehearsal.add(scenario)
            serving.append(scenario)
        except PlanError as error:
            refused[name] = str(error)
            logger.error("not served: %s", error)
    return Scenarios(_warned(serving), refused=refused, registry=registry)


def _open_exported(model_dir: Path) -> Scenarios:
    """Of a model without a folder of scenarios."""
    exported = open_exported(model_dir)
    if exported is None:
        return Scenarios()
    own = exported.scenario
    Rehearsal(model_dir, placement_of([own]), exported.ghosts).add(own)
    logger.info("the model is what scenario %s left; its full router measures lost mass", own.name)
    return Scenarios(_warned([own]), full=False, exported=exported)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a change of scenarios failed: %s", error)


def _warned(serving: list[Scenario]) -> list[Scenario]:
    for scenario in serving:
        for objection in scenario.objections:
            logger.warning("scenario %s is served although %s", scenario.name, objection)
        if scenario.recovery_file is not None:
            logger.info("scenario %s is served with %s", scenario.name, scenario.recovery_file.kind)
        elif scenario.unused:
            logger.warning("scenario %s is served without a recovery: %s", scenario.name, scenario.unused)
    return serving
