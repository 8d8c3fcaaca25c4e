"""The one family of errors that users see.

Every message is one line that says what was given, what was expected and what to do:

>>> raise ConfigError("unknown field 'hiden_size'", given="hiden_size=64", expected="a field of ModelConfig",
...                   fix="did you mean 'hidden_size'?")
ConfigError: unknown field 'hiden_size': got hiden_size=64; expected a field of ModelConfig; did you mean ...

Assertions are for our own bugs; anything that bad input can cause raises from here.
"""

from __future__ import annotations


class CrocutaError(Exception):
    """Base of all errors that bad input can cause."""

    def __init__(self, what: str, *, given: object = None, expected: object = None, fix: str | None = None):
        self.what, self.given, self.expected, self.fix = what, given, expected, fix
        text = what
        if given is not None:
            text += f": got {given}"
        if expected is not None:
            text += f"{';' if given is not None else ':'} expected {expected}"
        if fix is not None:
            text += f"; {fix}"
        super().__init__(" ".join(text.split()))


class ConfigError(CrocutaError, ValueError):
    """A configuration that names an unknown field or an impossible value."""


class InputError(CrocutaError, ValueError):
    """An argument of a call with the wrong shape, dtype, range or vocabulary."""


class StateError(CrocutaError, ValueError):
    """A state that does not fit the model, the batch or the number of tokens asked of it."""


class SequenceFormatError(CrocutaError, ValueError):
    """A broken FASTA, JSONL or text input; the message names file, line and reason."""


class WeightsFormatError(CrocutaError, ValueError):
    """A weights file that is broken, incomplete, or does not match its configuration."""


class TokenizerError(CrocutaError, ValueError):
    """Text that the tokenizer cannot represent, or a tokenizer that does not match the model."""


class CheckpointError(CrocutaError, RuntimeError):
    """A training checkpoint that could not be written, or none that could be read."""


class NonFiniteError(CrocutaError, ArithmeticError):
    """A NaN or an infinity where a finite number was due; the message names the place."""


class KernelUnavailableError(CrocutaError, RuntimeError):
    """A kernel was asked for by name and cannot run here; the message gives every kernel's reason."""


class MissingExtraError(CrocutaError, ImportError):
    """A feature that needs an optional package which is not installed."""


class CrocutaWarning(UserWarning):
    """Something that may surprise but does not stop the work."""
