"""Model file for TorchServe: exactly one class, made without arguments."""

from guard.lab.attacks import MnistCnn


class Network(MnistCnn):
    """The network that the demo trains."""
