"""One file per architecture, named as ``model_type`` in config.json and found by that name.

A file has two functions: ``read_config(fields) -> ModelConfig`` and ``build(config, kernels) -> Decoder``,
and two constants: ``NAMES``, what the family calls its tensors, and ``NUM_EXPERTS``, what its config calls
the number of routed experts ("a|b": either name). It may have ``PUBLISHED_CODE``: the class names its
published configs point to with ``auto_map``; we never run that code, we implement it, so exactly these are
let pass.
"""

import pkgutil
import re
from importlib import import_module
from typing import Protocol, cast

from moe_runtime.errors import CheckpointError
from moe_runtime.hf_config import Fields
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig


class Architecture(Protocol):
    NAMES: ModelNames
    NUM_EXPERTS: str

    def read_config(self, fields: Fields) -> ModelConfig: ...
    def build(self, config: ModelConfig, kernels: Kernels) -> Decoder: ...


def known_architectures() -> list[str]:
    """The model types that have a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_architecture(model_type: object, class_names: object = None) -> Architecture:
    """The module for ``model_type``; or for ``architectures[0]``, for configs whose model_type is older than
    the architecture (``BailingMoeV2ForCausalLM`` is ``bailing_moe_v2``). Raises CheckpointError for
    others.
    """
    known = known_architectures()
    names = [model_type]
    if isinstance(class_names, list) and len(class_names) == 1 and isinstance(class_names[0], str):
        class_name = class_names[0].removesuffix("ForCausalLM")
        names.append(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower())
    for name in names:
        # Only names of files that exist here are imported, never text from a config.
        if isinstance(name, str) and name in known:
            return cast(Architecture, import_module(f"{__name__}.{known[known.index(name)]}"))
    raise CheckpointError(
        f"model_type {str(model_type)[:60]!r} is not supported; supported: {', '.join(known)}",
        file="config.json",
    )
