"""What can go wrong, one class per stage. A leaf: it imports nothing, so every layer may use it.

Every message says what failed, where, what was got against what was wanted, and what to do next.
"""

from __future__ import annotations


class DccError(Exception):
    """Base of every error that dcc raises on purpose; `str()` is the whole message."""

    stage = "dcc"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        at: object = None,
        got: object = None,
        want: object = None,
        next: object = None,
    ) -> None:
        self.what = what
        self.details = {
            name: str(value)
            for name, value in (("at", at), ("got", got), ("want", want), ("next", next))
            if value is not None
        }
        super().__init__(what)

    def __str__(self) -> str:
        lines = [f"{self.stage}: {self.what}"]
        lines += [f"  {name:<5} {value}" for name, value in self.details.items()]
        return "\n".join(lines)


class UsageError(DccError):
    """The request itself is wrong: an unknown name, a value out of range."""

    stage = "usage"
    exit_code = 2


class LoadError(DccError):
    """The model file, folder or factory cannot be turned into a module."""

    stage = "load"


class TraceError(DccError):
    """The module cannot be captured as one graph."""

    stage = "trace"


class VerifyError(DccError):
    """A Program breaks a named rule of the verifier."""

    stage = "verify"


class PassError(DccError):
    """A pass failed, which is not the same as declining."""

    stage = "pass"


class SamplerError(DccError):
    """The sampler is unknown or is not a linear table."""

    stage = "sampler"


class ScheduleError(DccError):
    """A schedule is not valid, or does not fit the program and sampler that it is used with."""

    stage = "schedule"


class ExportError(DccError):
    """A stage has no lowering, or the artifact cannot be written."""

    stage = "export"


class ArtifactError(DccError):
    """The artifact is damaged, hostile, or of another format version."""

    stage = "artifact"


class ExecutionError(DccError):
    """A request cannot be executed by a loaded artifact."""

    stage = "run"


class Cancelled(DccError):
    """The caller's progress callback asked to stop."""

    stage = "run"


class QualityError(DccError):
    """The artifact misses the bound that was asked for."""

    stage = "quality"
    exit_code = 3
