"""Sequence: one growing list of tokens and how far the model has got with it.

There is no prefill phase and no decode phase: a sequence catches up ``num_computed`` to ``num_total``, in
chunks while that is far, one token at a time later, from zero again after a preemption.

    0 ........ num_computed ................ num_total ........ max_total
      in cache               pending: to be                room it may still grow into
                             computed next
"""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the scheduler while it is queued; nobody else writes ``num_computed`` or ``blocks``.

    ``salt`` separates cached prefixes that must not be shared (tenants, masks). ``logits_from`` is the first
    position whose logits are still wanted: normally the last token, 0 when the prompt's are wanted too.
    ``mask_row``: which experts its tokens may use, a row of the model's mask table, -1 for all.
    """

    sequence_id: int
    token_ids: list[int]
    max_total: int
    salt: str = ""
    logits_from: int = -1
    mask_row: int = -1
    num_prompt: int = 0
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when the sequence first started
    num_starts: int = 0  # 1 + number of preemptions survived
    blocks: list[int] = field(default_factory=list)
    lost_sum: float = 0.0  # lost mass (lost_mass.py) of its first tokens under a mask ...
    num_measured: int = 0  # ... and how many these are
    drift: str | None = None  # what its scenario's policy (drift_policy.py) did with it, None for nothing
    first_logits: int = 0  # what ``logits_from`` was at first
    num_registered: int = 0  # leading blocks known to the prefix index, set when the sequence starts ...
    prefix_node: int | str = ""  # ... and the node of the last of them

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)
        if self.logits_from < 0:
            self.logits_from = self.num_prompt - 1
        self.first_logits = self.logits_from

    @property
    def num_total(self) -> int:
        return len(self.token_ids)

    @property
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt]

    @property
    def lost_mass(self) -> float | None:
        """Mean over the tokens read under a mask; None where none was."""
        return self.lost_sum / self.num_measured if self.num_measured else None

    def restart(self) -> list[int]:
        """Forget what was computed, keep every token; returns the blocks to give back."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = 0
        return blocks

    def start_over(self, salt: str, mask_row: int) -> list[int]:
        """Become a sequence of another mask that has not been started; returns the blocks to give back."""
        self.salt, self.mask_row = salt, mask_row
        self.logits_from, self.num_starts, self.num_cached = self.first_logits, 0, 0
        return self.restart()
