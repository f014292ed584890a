"""Loads a base: any decoder-only transformers model, in NF4, its linears replaced by Fader's.

Knows module trees; knows nothing of files, requests or adapters.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels.backend import Backend, StackBackend, StateBackend
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.layers import Installed, install
from fader_adapters.stacks import absmax_of
from fader_server.errors import ModelUnsupported
from fader_server.model import attention
from fader_server.model.activation import replace_activations
from fader_server.model.checkpoint import quiet_libraries, read_config, read_nf4, why_not_packed
from fader_server.model.experts import keep_rows_apart, one_by_one
from fader_server.model.head import replace_ends, screen_of
from fader_server.model.identity import Identity
from fader_server.model.loaded import LoadedBase
from fader_server.model.norm import replace_gated_norms, replace_norms
from fader_server.model.precision import cast_base
from fader_server.model.quantizer import packed_stacks
from fader_server.model.recording import make_opaque
from fader_server.model.rehearsal import first_logits, rehearse
from fader_server.model.rotary import longest
from fader_server.model.states import NO_STATE
from fader_server.model.wanted import keep_wanted


def load_base(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    quantize_experts: bool = False,
    screen_head: bool = True,
) -> LoadedBase:
    """Read `source`, a local directory or Hub id, quantising to NF4 unless it already is; mixtures'
    experts as well, if asked. `screen_head`: a large output layer on a CPU gets a Screen.

    The checkpoint on disk is never written. Raises ConfigInvalid when nothing is there and
    ModelUnsupported, in one line, when it cannot be served.
    """
    config = read_config(source)
    text = config.get_text_config(decoder=True)
    attention.register()
    reason = why_not_packed(config)
    model = read_nf4(
        source,
        config,
        device=device,
        attn_implementation=None,
        quantize_experts=quantize_experts,
    )
    if not reason:  # only now: some towers choose their class by what they are built with
        with quiet_libraries():
            model.set_attn_implementation(attention.NAME)
    identity = Identity(model)  # before anything is repacked or let go of
    cast_base(model, dtype)
    try:
        installed = install(model, backend, name=source)
    except BaseUnsupported as error:
        raise ModelUnsupported(f"{source}: {error}") from error
    served = {stack.spec.path for stack in installed.stacks.values()}
    if strange := set(packed_stacks(model)) - served:
        raise ModelUnsupported(
            f"{source}: {min(strange)} is in NF4, and its module computes otherwise than Fader's "
            "kernels; serve the original without --quantize-experts"
        )
    # experts are let go of one by one as they are packed: nobody may still be hashing them
    digest = identity.digest() if installed.stacks else None
    if isinstance(backend, NativeBackend):
        _use_native(model, installed, backend, dtype)
    elif backend.name == "cuda":
        from fader_server.model.cuda_modules import use_cuda  # imports triton

        use_cuda(model)
    if isinstance(backend, StackBackend):
        _pack_experts(model, installed, backend)
    keep_wanted(model)
    screen = None
    if screen_head:
        screen = screen_of(model, installed, lambda: first_logits(model, packable=not reason))
    tape = backend.tape if isinstance(backend, NativeBackend) else None
    layers, solo, packed_states, state = {}, None, None, NO_STATE
    try:
        if reason:
            raise ModelUnsupported(f"{source}: {reason}")
        if device.type == "cpu":
            one_by_one(model)
        rehearsed = rehearse(model, source, dtype=dtype)
        layers = rehearsed.layers
        if device.type == "cpu":
            keep_rows_apart(model, rehearsed.calls, tape)
    except ModelUnsupported as error:
        from fader_server.model.solo_rehearsal import run_alone  # imports greenlet

        alone = run_alone(
            model, installed.state, source, dtype=dtype, packed=error,
            make=backend.states() if isinstance(backend, StateBackend) else None, tape=tape,
        )  # fmt: skip
        solo, packed_states = alone.forward, alone.states
        layers, state = alone.layers, alone.state
    spec = replace(installed.spec, weights=digest or identity.digest())
    return LoadedBase(
        model=model,
        installed=replace(installed, spec=spec),
        layers=layers,
        source=source,
        dtype=dtype,
        device=device,
        backend=backend,
        max_positions=longest(text, source),
        vocab_size=int(text.vocab_size),
        solo=solo,
        packed_states=packed_states,
        state=state,
        screen=screen,
    )


def _use_native(
    model: PreTrainedModel, installed: Installed, backend: NativeBackend, dtype: torch.dtype
) -> None:
    """Put native modules where they give what the model's own give."""
    tape = backend.tape
    installed.state.recorder = tape
    replace_norms(model, dtype=dtype, tape=tape)
    replace_gated_norms(model, dtype=dtype, tape=tape)
    replace_activations(model, dtype=dtype, tape=tape)
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            make_opaque(module, tape)
    replace_ends(model, installed, backend, dtype=dtype)


def _pack_experts(model: PreTrainedModel, installed: Installed, backend: StackBackend) -> None:
    """Bring stacks of experts into a backend's layout, one after the other; the model's modules
    keep nothing of what they were made of."""
    for stack in installed.stacks.values():
        if stack.spec.role == "experts":
            assert isinstance(stack.weight, StackWeight | Nf4Stack)
            stack.weight = backend.pack_stack(stack.weight)
            names = (stack.spec.path, absmax_of(stack.spec.path))
            for name, tensor in zip(names, stack.weight.resident, strict=False):
                held = model.get_parameter(name) if name == names[0] else model.get_buffer(name)
                held.data = tensor
