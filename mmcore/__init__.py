"""mmcore serves very many machine-learning models from few machines."""

__version__ = "0.1.0"
