"""Every error this project raises on purpose.

    MoeRuntimeError
    |-- ConfigError              a flag or option is wrong, before anything is loaded
    |-- CheckpointError          the model folder cannot be served as it is; names file and tensor
    |-- PlanError                a plan, mask, statistics file or certificate cannot be used as it is
    |-- KernelError              a kernel was called with tensors it cannot take (our bug, or a wrong backend)
    |   `-- IsaUnavailable       MOE_FORCE_ISA asks for instructions this machine lacks
    |-- RequestError             this one request is wrong; nothing else is affected
    |   |-- ContextLengthExceeded
    |   |-- ModelNotFound
    |   `-- OutsideScenario      the prompt is not what its scenario was made for, whose policy refuses it
    |-- Overloaded               the queue is full; try again later
    |-- ScenarioUnavailable      the scenario is being added or taken away; try again later
    |-- RequestFailed            admitted, then failed alone (non-finite logits)
    |-- DeviceLost               the GPU's driver has failed for good; only a new process can use it again
    `-- EngineStopped            the engine is draining or has died

A message says what failed, the value, the limit, and the knob that moves it.
"""


class MoeRuntimeError(Exception):
    """The root; never raised itself."""


class ConfigError(MoeRuntimeError):
    """For example ``--block-size 7``: not a power of two."""


class CheckpointError(MoeRuntimeError):
    """For example a tensor of the index that no file holds."""

    def __init__(self, message: str, *, file: str = "", tensor: str = "") -> None:
        where = ": ".join(part for part in (file, tensor) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.file = file
        self.tensor = tensor


class PlanError(MoeRuntimeError):
    """For example a mask that keeps 4 experts of a layer where each token takes 8."""


class KernelError(MoeRuntimeError):
    """For example an activation tensor that is not contiguous float32."""


class IsaUnavailable(KernelError):
    """For example MOE_FORCE_ISA=avx512 on a machine without it."""


class RequestError(MoeRuntimeError):
    """For example ``temperature=-1``. ``param`` names the field, ``code`` is OpenAI's code or ours."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthExceeded(RequestError):
    """For example a prompt of 5120 tokens for a context of 4096."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(RequestError):
    """For example ``model="gpt-4"`` on a server that serves the demo."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class OutsideScenario(RequestError):
    """For example a question about wealth products, asked to the scenario credit with a policy "reject"."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="outside_scenario")


class Overloaded(MoeRuntimeError):
    """For example the 513th waiting request at ``--max-queue 512``. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ScenarioUnavailable(MoeRuntimeError):
    """For example a request for a scenario whose experts are just leaving. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(MoeRuntimeError):
    """For example a row of logits that holds NaN: this request ends, its neighbours go on."""


class DeviceLost(MoeRuntimeError):
    """For example an illegal memory access: from then on every call of the driver fails."""


class EngineStopped(MoeRuntimeError):
    """For example a request that arrives after SIGTERM."""
