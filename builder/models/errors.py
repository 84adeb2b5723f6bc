"""The expected failure of reading a model's config."""


class UnsupportedModelError(ValueError):
    """The config asks for something this project does not compute, or lacks a field; the message names it."""
