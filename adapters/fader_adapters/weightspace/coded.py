"""A checkpoint in the codes of another method, as if it held the weights themselves."""

from collections.abc import Iterator, Mapping

import torch

from fader_adapters.errors import CheckpointInvalid
from fader_adapters.weightspace.methods import Method
from fader_adapters.weightspace.tensors import Checkpoint, Stored

_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


class Decoded(Checkpoint):
    """Every weight in codes is there under the key that it would have by itself, and decoded when
    it is read; what belongs to codes is not there."""

    def __init__(self, files: Checkpoint, method: Method, dtype: torch.dtype | None) -> None:
        """`dtype`: what weights are decoded to; None: that of the files' other matrices.

        Raises CheckpointInvalid where a weight is not whole, or where there are codes that are not
        the method's, or none that are.
        """
        self.directory, self.files, self.method = files.directory, files.files, method
        self.dtype = dtype or _dtype_of(files.tensors, method)
        self._files = files
        self.coded = {weight.name: weight for weight in method.find(files)}
        if not self.coded:
            raise CheckpointInvalid(
                f"{files.directory}: its config says {method.told}, and its files hold no such "
                "weights; remove quantization_config from config.json if they are plain"
            )
        spent = {key for weight in self.coded.values() for key in weight.parts}
        self.tensors = {key: item for key, item in files.tensors.items() if key not in spent}
        for key, weight in self.coded.items():
            if key in self.tensors:
                raise CheckpointInvalid(f"{key!r} is there by itself and as codes")
            if 0 in weight.shape:
                raise CheckpointInvalid(f"{weight.key!r} holds codes of nothing: {weight.shape}")
            codes = files.tensors[weight.key]
            self.tensors[key] = Stored(key, codes.file, self.dtype, weight.shape, codes.start)
        lost = next((key for key in sorted(self.tensors) if key.endswith(method.beside)), None)
        if lost is not None:
            raise CheckpointInvalid(f"{lost!r} belongs to no weight in {method.told}")
        if told := codes_among(self.tensors):
            raise CheckpointInvalid(f"{told}, which {method.told} has nothing of")

    def read(self, key: str) -> torch.Tensor:
        """As of any checkpoint. Raises CheckpointInvalid where scales are no numbers."""
        weight = self.coded.get(key)
        return self._files.read(key) if weight is None else weight.read(self._files, self.dtype)

    def chunks(self, key: str, *, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
        """As of any checkpoint; a weight in codes is decoded as a whole."""
        if key in self.coded:
            yield from self.read(key).view(-1).split(elements)
        else:
            yield from self._files.chunks(key, elements=elements)


def codes_among(tensors: Mapping[str, Stored]) -> str:
    """The first weight that is codes of a byte, with its dtype; empty: none. Masks of old
    checkpoints are of such dtypes as well."""
    for key, stored in tensors.items():
        weight = len(stored.shape) == 3 or (len(stored.shape) == 2 and key.endswith("weight"))
        if weight and stored.dtype in _CODES:
            return f"{key} is {str(stored.dtype).removeprefix('torch.')}"
    return ""


def _dtype_of(tensors: Mapping[str, Stored], method: Method) -> torch.dtype:
    found = (
        item.dtype
        for key, item in sorted(tensors.items())
        if item.dtype in _PLAIN and len(item.shape) > 1 and not key.endswith(method.beside)
    )
    return next(found, torch.bfloat16)
