"""potstill: knowledge distillation for PyTorch."""

from potstill._version import __version__ as __version__
