"""A tensor of the pretended device: says cuda:0, and holds its values on the CPU."""

from typing import Any

import torch

from tests.support.pretend_cuda.memory import Allocation


class Pretend(torch.Tensor):
    """Has no memory of its own as far as torch knows; every operator goes through the device."""

    elem: torch.Tensor
    """The values."""
    home: Allocation

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, elem: torch.Tensor, home: Allocation) -> "Pretend":
        with torch.inference_mode(False):  # torch wants views of what is no inference tensor so
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                elem.shape,
                strides=elem.stride(),
                storage_offset=elem.storage_offset(),
                dtype=elem.dtype,
                device=torch.device("cuda", 0),
            )
        made.elem, made.home = elem, home
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a thread that does not know the pretended device")

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.elem!r})"

    @property
    def data(self) -> torch.Tensor:
        return Pretend(self.elem, self.home)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        assert isinstance(other, Pretend), "the data of a CUDA tensor must be a CUDA tensor"
        torch.Tensor.data.__set__(self, other)  # pyright: ignore
        self.elem, self.home = other.elem, other.home

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()
