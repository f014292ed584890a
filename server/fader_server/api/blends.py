"""Names of adapters as requests spell them: `name`, `name@version`, terms with weights.

Knows the grammar only, not which adapters exist.
"""

from dataclasses import dataclass
from typing import Any

from fader_adapters.spec import ADAPTER_NAME, DIGEST_PREFIX, MAX_WEIGHT, NESTED_NAME
from fader_server.api.fields import Fields, is_finite
from fader_server.errors import RequestInvalid


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter by name, at its current version or at one given by 12 or more hex digits."""

    name: str
    version: str | None = None

    @classmethod
    def read(cls, text: object) -> "AdapterRef | None":
        """Parse `name` or `name@version`; None when it is neither."""
        if not isinstance(text, str):
            return None
        name, at, version = text.partition("@")
        if not (ADAPTER_NAME.fullmatch(name) or NESTED_NAME.fullmatch(name)):
            return None
        if at and not DIGEST_PREFIX.fullmatch(version):
            return None
        return cls(name, version or None)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class NamedTerm:
    """One adapter of a blend, not yet resolved."""

    ref: AdapterRef
    weight: float


def read_blend(fields: Fields, max_terms: int) -> tuple[NamedTerm, ...] | None:
    """The blend in `adapters`, or in llama.cpp's `lora`; None when neither is given."""
    if fields.raw("adapters") is not None and fields.raw("lora") is not None:
        fields.refuse("lora", "cannot stand beside adapters")
        return None
    if fields.raw("adapters") is not None:
        return _read(fields, "adapters", frozenset({"name"}), "weight", max_terms)
    if fields.raw("lora") is not None:
        return _read(fields, "lora", frozenset({"name", "id"}), "scale", max_terms)
    return None


def read_named(fields: Fields, model: str, max_terms: int) -> tuple[NamedTerm, ...] | None:
    """As `read_blend`, or the one adapter of SGLang's `lora_path`; its benchmark names it as the
    model, too."""
    terms = read_blend(fields, max_terms)
    name = fields.string("lora_path", longest=512)
    if not name or name == model:
        return terms
    ref = AdapterRef.read(name)
    if ref is None or terms is not None:
        fields.refuse("lora_path", "must be an adapter's name, and stand alone beside the base")
        return None
    return (NamedTerm(ref, 1.0),)


def _read(
    fields: Fields, field: str, names: frozenset[str], weight_name: str, max_terms: int
) -> tuple[NamedTerm, ...]:
    items = fields.raw(field)
    if not isinstance(items, list) or not 1 <= len(items) <= max_terms:
        raise _invalid(f"{field} must be a list of 1 to {max_terms} adapters", field)
    terms = [_term(item, field, names, weight_name) for item in items]
    if len({term.ref for term in terms}) != len(terms):
        raise _invalid(f"{field} names an adapter twice; add its weights", field)
    return tuple(terms)


def _term(item: Any, field: str, names: frozenset[str], weight_name: str) -> NamedTerm:  # noqa: ANN401
    spelled = " or ".join(sorted(names))
    if not isinstance(item, dict):
        raise _invalid(f"{field} must hold objects with {spelled} and {weight_name}", field)
    given = [name for name in names if name in item]
    if len(given) != 1 or item.keys() - {*given, weight_name}:
        raise _invalid(f"{field} takes {spelled} and {weight_name} in each item, only", field)
    ref = AdapterRef.read(item[given[0]])
    if ref is None:
        raise _invalid(f"{field} needs adapter names, or name@version with 12+ hex digits", field)
    weight = item.get(weight_name, 1.0)
    if not is_finite(weight) or not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise _invalid(
            f"{field} needs a {weight_name} from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}", field
        )
    return NamedTerm(ref, float(weight))


def _invalid(text: str, field: str) -> RequestInvalid:
    return RequestInvalid(text, param=field, code="blend_invalid")
