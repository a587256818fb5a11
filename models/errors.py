"""What can be wrong with a model that a user names. Every message says what to do."""


class ModelError(Exception):
    """The model cannot be used as it is."""


class CheckpointError(ModelError):
    """Files are missing, truncated or inconsistent with config.json."""


class UnsupportedModel(ModelError):
    """The architecture, or a variant of it, is not one that sotto runs."""


class ContextExceeded(ModelError):
    """More tokens than the model's context holds."""


class TextError(ModelError):
    """A text that is none: lone surrogates, from an escape in JSON or a command line that was not UTF-8."""
