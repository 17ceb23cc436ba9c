"""What can be wrong with a request by itself, found before it is queued."""

from collections.abc import Sequence

from moe_runtime.errors import ContextLengthExceeded, RequestError
from moe_runtime.sampling import SamplingParams


def check_request(
    prompt_ids: Sequence[int], params: SamplingParams, vocab_size: int, max_context: int
) -> None:
    """Raise RequestError or ContextLengthExceeded for a request that must not be admitted."""
    if not prompt_ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise RequestError(f"prompt token ids must be from 0 to {vocab_size - 1}", param="prompt")
    room = max_context - len(prompt_ids)
    if room < (0 if params.max_tokens == 0 else 1):
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt_ids)} tokens and the context is {max_context} tokens, "
            "which must hold at least one more; shorten it or raise --max-context",
            param="prompt",
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}, "
            f"together more than the context of {max_context}; lower max_tokens to {room} or less",
            param="max_tokens",
        )
    if params.min_tokens > room:
        raise RequestError(f"min_tokens must be at most {room} for this prompt", param="min_tokens")
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            raise RequestError(f"{name} has token ids beyond 0 to {vocab_size - 1}", param=name)
