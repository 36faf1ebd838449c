"""Data sets and losses of each measurement: HH perplexity, and the bias, ethics and truth log-odds losses."""

from utils.performance_functions.bias import BIAS
from utils.performance_functions.ethics import ETHICS
from utils.performance_functions.pairs import Measurement
from utils.performance_functions.truth import TRUTH

MEASUREMENTS: dict[str, Measurement] = {measurement.name: measurement for measurement in (BIAS, ETHICS, TRUTH)}
