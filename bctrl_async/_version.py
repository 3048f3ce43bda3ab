"""The version, in a module that the build and the package can both read."""

__version__ = "0.1.0"
