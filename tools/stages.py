"""The five files as modules, for the scripts of this folder: from stages import common, infer.

A name that begins with a digit needs importlib, and Python looks in tools/ alone: both are settled here once.
read_results() is what several of the scripts read of stage 04.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent  # the repository
sys.path.insert(0, str(ROOT))

common = importlib.import_module("common")
prepare = importlib.import_module("01_prepare_data")
infer = importlib.import_module("02_infer_profiles")
quantize = importlib.import_module("03_quantize")
ctr = importlib.import_module("04_train_ctr")


def read_results(run, dataset):
    """results.json of stage 04, checked to be of this data set and of the bank that is there now."""
    results = common.load(run, "results.json", ("summary", "rows", "fingerprints"))
    made_from = results["fingerprints"]
    common.check_same(run, "results.json", "dataset", made_from["dataset"], dataset.fingerprint())
    if "bank userip" in made_from:
        codes = common.load(run, "quantize.json", ("codes",))["codes"]
        known = common.fingerprint(np.array(common.load(run, "feature_bank.npy")), codes)
        common.check_same(run, "results.json", "feature_bank.npy", made_from["bank userip"], known)
    return results
