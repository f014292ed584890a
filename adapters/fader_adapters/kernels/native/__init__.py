"""Native CPU kernels behind torch tensors: NF4 weights, batched LoRA, paged attention. Knows no
models, no requests.

`available()` says whether the library is there, `reason()` why not; every other name needs it.
"""

from fader_adapters.kernels.native.activation import activation
from fader_adapters.kernels.native.attention import PagedAttention, paged_attention
from fader_adapters.kernels.native.attention import fits as attention_fits
from fader_adapters.kernels.native.experts import ExpertPanels
from fader_adapters.kernels.native.library import LEVELS, available, best_isa, isa, reason, set_isa
from fader_adapters.kernels.native.logits import Draws, draw, largest, score
from fader_adapters.kernels.native.norm import GateForm, gated_rms_norm, rms_norm
from fader_adapters.kernels.native.ops import Call, Kind, Map, Op, Tape
from fader_adapters.kernels.native.panels import Nf4Panels, PanelStore, in_huge_pages
from fader_adapters.kernels.native.plain import PlainPanels
from fader_adapters.kernels.native.program import Program, StepInputs, words_of
from fader_adapters.kernels.native.quantise import (
    BLOCK,
    NESTED_BLOCK,
    Nested,
    Quantised,
    dequantise_absmax,
    dequantise_nf4,
    quantise_absmax,
    quantise_keeping,
    quantise_nf4,
)
from fader_adapters.kernels.native.screen import Screen
from fader_adapters.kernels.native.selective import SelectiveScan
from fader_adapters.kernels.native.site import Lookup, Site, SiteTables, delta, gemm
from fader_adapters.kernels.native.state_maker import NativeStates
from fader_adapters.kernels.native.states import Convolution, Scan, ScanForm, StateRows
from fader_adapters.kernels.native.step import StepPlan
from fader_adapters.kernels.native.threads import alone, set_threads, threads
from fader_adapters.kernels.native.workspace import Workspace

__all__ = [
    "BLOCK",
    "LEVELS",
    "NESTED_BLOCK",
    "Call",
    "Convolution",
    "Draws",
    "ExpertPanels",
    "GateForm",
    "Kind",
    "Lookup",
    "Map",
    "NativeStates",
    "Nested",
    "Nf4Panels",
    "Op",
    "PagedAttention",
    "PanelStore",
    "PlainPanels",
    "Program",
    "Quantised",
    "Scan",
    "ScanForm",
    "Screen",
    "SelectiveScan",
    "Site",
    "SiteTables",
    "StateRows",
    "StepInputs",
    "StepPlan",
    "Tape",
    "Workspace",
    "activation",
    "alone",
    "attention_fits",
    "available",
    "best_isa",
    "delta",
    "dequantise_absmax",
    "dequantise_nf4",
    "draw",
    "gated_rms_norm",
    "gemm",
    "in_huge_pages",
    "isa",
    "largest",
    "paged_attention",
    "quantise_absmax",
    "quantise_keeping",
    "quantise_nf4",
    "reason",
    "rms_norm",
    "score",
    "set_isa",
    "set_threads",
    "threads",
    "words_of",
]
