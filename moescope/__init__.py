"""The ground under every package of moescope: the version and the exception tree. It imports nothing of ours."""

__version__ = "0.1.0"
