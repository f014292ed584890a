"""Where the modules of an adapter's model lie in the base. Names and rows; no tensors."""

from dataclasses import dataclass

from fader_adapters.spec import Role


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start..stop of W of one linear."""

    linear: int
    """Index into BaseSpec.linears."""
    start: int
    stop: int
    expert: int | None = None
    """Of a stack; None: all of it, or no stack."""


@dataclass(frozen=True, slots=True)
class Place:
    """One module as the adapter's model has it: its rows lie in these spans, in order."""

    path: str
    """With the base's prefix."""
    in_features: int
    spans: tuple[Span, ...]
    role: Role
    experts: int = 1
    """Linears of the stack, if it is a whole one."""

    @property
    def out_features(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    @property
    def table(self) -> tuple[int, int]:
        """Tokens and width of an embedding, or of the output head."""
        if self.role == "embedding":
            return self.in_features, self.out_features
        return self.out_features, self.in_features

    @property
    def module(self) -> bool:
        """Whether it is a module of the adapter's model, not a parameter of one."""
        return self.role != "experts" or self.spans[0].expert is not None
