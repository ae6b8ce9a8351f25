"""Runtimes that are processes of their own: what speaks the ModelRuntime SPI, and servers with an adapter."""

from mmcore.adapters.external import External, ExternalModel
from mmcore.adapters.opening import open_external, open_runtime
from mmcore.adapters.runtime import SERVICE, Runtime, has_forgotten

__all__ = ["SERVICE", "External", "ExternalModel", "Runtime", "has_forgotten", "open_external", "open_runtime"]
