"""The adapter library's errors. Each message says what was expected, what came and what to do.

AdapterError
├── AdapterInvalid        the files are malformed, or use something that is not implemented exactly
├── AdapterMismatch       a sound adapter, but made for another base
├── AdapterTooLarge       can never fit: rank, file or arena limits
├── ArenaFull             does not fit now: what is loaded and leased leaves too little room
├── AdapterNotFound       no such name or version
├── AdapterExists         the name is taken
│   └── NameReserved      by something that is no adapter: the base or a recipe
├── VersionConflict       compare-and-swap on a version that moved
├── BlendInvalid          weights, number of terms, duplicates
├── SourceForbidden       outside the allowed roots, or not a plain file
├── SourceNotFound        nothing there (told apart from SourceForbidden only to administrators)
│   └── SourceIncomplete  a folder that may be read, without an adapter's files: says what it has
├── SourceUnavailable     a disk or remote source failed, or was silent too long: try again later
├── BaseUnsupported       the base model cannot be served by these kernels
├── CheckpointInvalid     a model's files are malformed, incomplete or of a form that is not read
├── DeltaEmpty            there is no difference to merge, extract or compress
├── TargetTaken           the output directory holds, or another run writes, something else
└── KernelUnavailable     a backend was asked for that this machine cannot run
"""


class AdapterError(Exception):
    """Base of every error a user, a file or a machine can cause in this library."""


class AdapterInvalid(AdapterError):
    """The adapter's files are malformed or use something that is not implemented exactly."""


class AdapterMismatch(AdapterError):
    """The adapter was made for another base."""


class AdapterTooLarge(AdapterError):
    """The adapter can never fit."""


class ArenaFull(AdapterError):
    """The adapter does not fit beside what is loaded and leased now.

    `nbytes` is what it needs in one piece; 0: a name less in memory would do; None: no lease that
    ends would help.
    """

    def __init__(self, message: str, *, nbytes: int | None = None) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class AdapterNotFound(AdapterError):
    """No adapter has this name or version."""

    @classmethod
    def of(cls, name: str) -> "AdapterNotFound":
        """Absent, unloaded and forbidden names are one: all are told in these words."""
        return cls(f"no adapter {name[:160]!r} is loaded")


class AdapterExists(AdapterError):
    """The name is taken."""


class NameReserved(AdapterExists):
    """The name belongs to the base or a recipe."""


class VersionConflict(AdapterError):
    """The name is at another version than the caller expected."""


class BlendInvalid(AdapterError):
    """A blend's weights, terms or names are not acceptable."""


class SourceForbidden(AdapterError):
    """The source lies outside the allowed roots or is not a plain file."""


class SourceNotFound(AdapterError):
    """The source does not exist."""


class SourceIncomplete(SourceNotFound):
    """A folder is there, the files of an adapter are not."""


class SourceUnavailable(AdapterError):
    """A disk or a remote source failed or was silent; the same call may succeed later."""


class BaseUnsupported(AdapterError):
    """The base model cannot be served."""


class KernelUnavailable(AdapterError):
    """The requested kernel backend cannot run on this machine."""


class CheckpointInvalid(AdapterError):
    """A model's files are malformed, incomplete or of a form that is not read."""


class DeltaEmpty(AdapterError):
    """There is no difference to merge, extract or compress."""


class TargetTaken(AdapterError):
    """The output directory holds something else, or another run writes it."""


def first_line(error: BaseException) -> str:
    """What a library's error says, without its advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
