"""The bulk stop: many targets, exactly one outcome for each."""

from bctrl_async.bulk._batch import StopBatch
from bctrl_async.bulk._input import Targets
from bctrl_async.bulk._options import OnOutcome
from bctrl_async.bulk._state import Progress

__all__ = ["OnOutcome", "Progress", "StopBatch", "Targets"]
