"""The five files as modules, for the scripts of this folder: from stages import common, infer.

A name that begins with a digit needs importlib, and Python looks in tools/ alone: both are settled here once.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the repository
sys.path.insert(0, str(ROOT))

common = importlib.import_module("common")
prepare = importlib.import_module("01_prepare_data")
infer = importlib.import_module("02_infer_profiles")
quantize = importlib.import_module("03_quantize")
ctr = importlib.import_module("04_train_ctr")
