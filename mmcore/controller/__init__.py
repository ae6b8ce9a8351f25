"""The Kubernetes controller: ``Predictor``, ``InferenceService``, ``ServingRuntime`` and ``ClusterServingRuntime``.

What objects mean is decided by pure functions (from dictionaries to dictionaries); the reconcilers carry it out. It
talks to instances through their management API alone.
"""
