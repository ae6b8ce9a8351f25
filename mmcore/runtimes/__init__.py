"""Built-in runtimes: one file per format behind one interface; a framework is imported when first needed.

What is loaded from here runs code of the model's owner (a pickle, a ``model.py``): only folders whose writers are
trusted may be served.
"""

from mmcore.runtimes.interface import LoadedModel, OutputTensor
from mmcore.runtimes.loading import FORMATS, load_model

__all__ = ["FORMATS", "LoadedModel", "OutputTensor", "load_model"]
