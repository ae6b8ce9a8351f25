"""Trains the model of the quickstart into the bucket's folder given: a classifier of irises."""

from __future__ import annotations

import sys
from pathlib import Path

import joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

bucket = Path(sys.argv[1])
flowers, species = load_iris(return_X_y=True)
(bucket / "iris").mkdir(parents=True, exist_ok=True)
joblib.dump(LogisticRegression(max_iter=1000).fit(flowers, species), bucket / "iris" / "model.joblib")
