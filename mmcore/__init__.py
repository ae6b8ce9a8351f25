"""mmcore serves very many machine-learning models from few machines."""
