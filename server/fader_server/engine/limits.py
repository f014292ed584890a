"""What a step and a request may be at most. Numbers only."""

from dataclasses import dataclass

from fader_server.core import Request
from fader_server.errors import ConfigInvalid, ContextTooLong, RequestInvalid

_TOKEN_IDS = 1 << 32


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the scheduler, checked at birth."""

    max_rows: int = 16
    """Sequences that run at a time."""
    max_step_tokens: int = 512
    """Tokens of one step: a decode token per row, the rest for prefill chunks."""
    chunk_size: int = 256
    """A prefill chunk ends where the position is a multiple of this, whatever shares its step."""
    max_model_len: int = 4096
    """Tokens of one sequence, prompt and output."""
    max_overtakes: int = 16
    """So often may others be admitted before a request whose adapters have no room."""
    solo: bool = False
    """A sequence that was sent back computes its own tokens again one by one, as it first did: the
    base gives other bits for several at a time."""
    lookup: int = 0
    """Rows up to which guesses from what texts hold already fill a decode step; 0: none."""
    block: int = 0
    """Tokens of a block, where a long prompt stops at the end of one, for the state it has there to
    be kept; 0: there are no states to keep."""

    def __post_init__(self) -> None:
        if min(self.max_rows, self.chunk_size, self.max_model_len) < 1 or self.max_overtakes < 0:
            raise ConfigInvalid(f"the scheduler's limits must be positive, got {self}")
        if self.max_step_tokens < self.max_rows + self.chunk_size:
            raise ConfigInvalid(
                f"a step must hold every row and one prefill chunk: expected at least "
                f"{self.max_rows} + {self.chunk_size} tokens, got {self.max_step_tokens}; "
                f"raise --max-step-tokens or lower --max-batch-rows"
            )


def check_request(request: Request, context: int) -> None:
    """Refuse what can never be served in `context` tokens. Raises RequestInvalid."""
    prompt, wanted = len(request.prompt), request.params.max_tokens
    if not prompt:
        raise RequestInvalid("the prompt must hold at least one token, got none", param="prompt")
    if wanted < 0:
        raise RequestInvalid(f"max_tokens must be 0 or more, got {wanted}", param="max_tokens")
    if prompt + wanted > context:
        what = f"you requested {prompt} tokens in the prompt and {wanted} in the completion"
        param = "prompt" if prompt > context else "max_tokens"
        raise ContextTooLong.of(context, what, param=param)
    if any(term.version not in request.adapters for term in request.blend.terms):
        raise RequestInvalid("a version of the blend came without its data", param="adapters")


def check_ids(prompt: tuple[int, ...]) -> None:
    """Refuse ids of no vocabulary. Looks at each. Raises RequestInvalid."""
    if min(prompt) < 0 or max(prompt) >= _TOKEN_IDS:
        raise RequestInvalid("a prompt token id lies outside the vocabulary", param="prompt")
