"""The server's errors. Only api/errors.py knows which HTTP status each one becomes.

FaderError
├── ConfigInvalid         a flag, file or variable the user can mend (exit code 2)
├── ModelUnsupported      the base cannot be served: says why in one line (exit code 2)
├── RequestInvalid        a malformed or impossible request; carries the offending parameter
│   └── ContextTooLong    prompt + output exceed the model's context
├── ModelNotFound         no such base, adapter, version or recipe for this caller
├── AdapterUnavailable    the request is fine, what lies at its adapter's source is not
├── MergeBusy             the merged lane is being made or measured
├── MergeNoMemory         a merged lane does not fit beside what is reserved
├── MergeNotFound         there is no merged lane and none is being made
├── MergeLossy            4 bits would lose too much of the blend
├── RecipeNotFound        an administrator named a recipe that is not there
├── RecipeConflict        compare-and-swap on a recipe that moved
├── RecipeIncomplete      the recipe is there, an adapter that it names is not
├── ServerRefused         a running server said no, or there is none (exit code 2)
├── ServerFailed          a running server failed, or what answered is none (exit code 1)
├── TryLater              not now; says when to ask again
│   ├── Overloaded        the queue is full, or the server drains
│   └── TenantBusy        the caller has its part of the queue or of the minute
├── RequestTimeout        a request's own deadline passed
└── EngineFault           a fault inside the engine; the request failed, others go on
    └── NumericFault      an adapter or blend produced NaN or Inf for this request
"""


class FaderError(Exception):
    """Base of every error the server reports."""


class ConfigInvalid(FaderError):
    """The configuration cannot be used."""


class ModelUnsupported(FaderError):
    """The base model cannot be served."""


class RequestInvalid(FaderError):
    """The request is malformed or can never be served.

    `param` names the offending field as the client spelled it, `code` is a stable machine name.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(RequestInvalid):
    """Prompt and output do not fit the model's context."""

    @classmethod
    def of(cls, context: int, what: str, *, param: str) -> "ContextTooLong":
        """what: a sentence on what was asked for. Clients look for the first words and the code."""
        return cls(
            f"This model's maximum context length is {context} tokens. However, {what}. "
            "Please reduce the length (context_length_exceeded).",
            param=param,
        )


class ModelNotFound(FaderError):
    """The requested model does not exist for this caller."""


class AdapterUnavailable(FaderError):
    """An adapter that a request names cannot be loaded, whatever the request."""


class MergeBusy(FaderError):
    """Another merge is under way."""


class MergeNoMemory(FaderError):
    """There is too little memory for a merged lane; nothing was allocated."""


class MergeNotFound(FaderError):
    """Nothing is merged or being merged."""


class MergeLossy(FaderError):
    """The merged lane in 4 bits would not be the blend any more."""


class RecipeNotFound(FaderError):
    """No recipe has this name."""


class RecipeConflict(FaderError):
    """The recipe is at another digest than the caller expected."""


class RecipeIncomplete(FaderError):
    """The recipe names an adapter or a version that is not loaded."""


class ServerRefused(FaderError):
    """A running server said no, or there is none: the caller can mend it."""


class ServerFailed(FaderError):
    """A running server failed, or what answered is no Fader."""


class TryLater(FaderError):
    """The same request may be served later. `retry_after` is in whole seconds, 1 to 120."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(TryLater):
    """The server cannot take the request now."""


class TenantBusy(TryLater):
    """The tenant has asked for as much as it may."""


class RequestTimeout(FaderError):
    """The request's own deadline passed."""


class EngineFault(FaderError):
    """The engine failed this request."""


class NumericFault(EngineFault):
    """The request's logits were not finite."""
