"""Tools, how a chat may use them, and calls: the nouns. Knows no format, no tokens and no HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; checked by the API."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of an object."""
    strict: bool = False
    """Its arguments have the schema, also where the model is free to call or not."""

    @property
    def shown(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
            },
        }


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one call offers: tools, at least one, and what the answer may or must do with them."""

    tools: tuple[Tool, ...]
    """All of them are shown to the model."""
    must: bool = False
    """The answer is calls and nothing else."""
    only: tuple[str, ...] | None = None
    """The tools that may be called; None: all."""
    parallel: bool = True
    """Several calls in one answer."""

    @property
    def kept(self) -> bool:
        """A grammar keeps calls to their form: they are whole unless the answer is cut."""
        return self.must or any(tool.strict for tool in self.offered)

    @property
    def offered(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(tool for tool in self.tools if self.only is None or tool.name in self.only)


@dataclass(frozen=True, slots=True)
class CallPart:
    """What a call that an answer makes gains."""

    name: str
    """Of a tool that was offered, where the call begins; "": it goes on."""
    arguments: str
    """Together they are a JSON object."""
    ends: bool
    """Nothing more of it comes."""
