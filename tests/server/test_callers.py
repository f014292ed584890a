"""Which modules call what, and how those that must are kept apart."""

import torch
from torch import nn

from fader_server.model.callers import Callers, Heard
from fader_server.model.experts import keep_rows_apart


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x).sigmoid() * x


class Model(nn.Module):
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.act = nn.SiLU()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.gate(x)) * self.scale.sigmoid()


def heard(model: Model) -> dict[nn.Module, set[Heard]]:
    callers = Callers(model)
    with torch.inference_mode(), callers.listening():
        model(torch.randn(2, 8))
    return callers.calls


def named(model: Model, operator: str) -> set[nn.Module]:
    return {m for m, calls in heard(model).items() if Heard(operator, torch.float32) in calls}


def test_a_call_belongs_to_the_innermost_module_whose_code_makes_it():
    model = Model()
    assert named(model, "sigmoid") == {model.gate}, "a parameter's is no row's"
    assert named(model, "silu") == {model.act}
    assert named(model, "linear") | named(model, "addmm") == {model.gate.product}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_runs_inside_of_modules_that_see_to_it_themselves_is_nobodys():
    model = Model()
    callers = Callers(model, but=[model.gate])
    with torch.inference_mode(), callers.listening():
        model(torch.randn(2, 8))
    assert set(callers.calls) == {model, model.act}


def test_only_modules_that_call_such_functions_run_in_a_mode_and_all_are_given_back():
    model = Model()
    x = torch.randn(3, 8)
    expected = model(x)
    end = keep_rows_apart(model, heard(model), None)
    changed = {m for m in model.modules() if "forward" in vars(m)}
    assert changed == {model.gate, model.gate.product, model.act}
    torch.testing.assert_close(model(x), expected)
    end()
    assert torch.equal(model(x), expected)
    assert all(m.forward.__func__ is type(m).forward for m in changed)
