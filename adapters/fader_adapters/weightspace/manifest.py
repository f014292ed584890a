"""How far a merge has come: what it is made from and which shards are finished. Plain facts."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fader_adapters.errors import AdapterInvalid, TargetTaken
from fader_adapters.strict_json import load_object
from fader_adapters.weightspace import disk
from fader_adapters.weightspace.loss import LinearLoss

MANIFEST_FILE = "merge_manifest.json"
_FORMAT = "fader-merge-1"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What decides every byte of the output; two merges with the same go on with each other."""

    base: str
    """sha256 over the base's files."""
    blend: str
    """The blend's digest."""
    dtype: str
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """One shard that is on the disk."""

    sha256: str
    nbytes: int
    """Of the file."""
    losses: tuple[LinearLoss, ...]


@dataclass
class Manifest:
    """The inputs of a merge and its finished shards by file name."""

    inputs: Inputs
    shards: dict[str, Finished] = field(default_factory=dict)

    def holds(self, directory: Path, name: str) -> bool:
        """Whether a shard is finished and has the bytes it was finished with."""
        known, path = self.shards.get(name), directory / name
        if known is None or not path.is_file() or path.stat().st_size != known.nbytes:
            return False
        return disk.hash_file(path).sha256 == known.sha256

    def save(self, directory: Path) -> None:
        """Replace the manifest on the disk in one instant."""
        shards = {
            name: {
                "sha256": shard.sha256,
                "bytes": shard.nbytes,
                "linears": [loss.document() for loss in shard.losses],
            }
            for name, shard in self.shards.items()
        }
        document = {"format": _FORMAT, "inputs": asdict(self.inputs), "shards": shards}
        disk.write_json(directory / MANIFEST_FILE, document)


def open_manifest(directory: Path, inputs: Inputs) -> Manifest:
    """The manifest in `directory`, or a new one where there is nothing.

    Raises TargetTaken when the directory holds something else, or a merge of other inputs.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        started = {MANIFEST_FILE + disk.PART}
        strangers = sorted(entry.name for entry in directory.iterdir() if entry.name not in started)
        if strangers:
            raise TargetTaken(
                f"{directory} is not empty (there is {strangers[0]!r}) and no merge was begun in "
                "it; name a new directory"
            )
        manifest = Manifest(inputs)
        manifest.save(directory)
        return manifest
    try:
        document = load_object(path.read_bytes(), MANIFEST_FILE)
        if document["format"] != _FORMAT:
            raise ValueError("another format")
        before = Inputs(**document["inputs"])
        shards = {name: _finished(facts) for name, facts in document["shards"].items()}
    except (AdapterInvalid, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TargetTaken(
            f"{path} cannot be read ({error}); name a new directory, or empty this one"
        ) from None
    other = [f.name for f in fields(Inputs) if getattr(before, f.name) != getattr(inputs, f.name)]
    if other:
        raise TargetTaken(
            f"{directory} holds a merge with another {_listed(other)}; name a new directory, "
            "empty this one, or give what it was begun with"
        )
    return Manifest(inputs, shards)


def _finished(facts: dict[str, Any]) -> Finished:
    losses = tuple(LinearLoss.of_document(item) for item in facts["linears"])
    return Finished(str(facts["sha256"]), int(facts["bytes"]), losses)


def _listed(names: Iterable[str]) -> str:
    return " and another ".join(name.replace("_", " ") for name in names)
