"""The bulk stop: many targets, exactly one outcome for each."""

from bctrl_async.bulk._batch import StopBatch
from bctrl_async.bulk._options import OnOutcome, Progress
from bctrl_async.bulk._targets import Targets

__all__ = ["OnOutcome", "Progress", "StopBatch", "Targets"]
