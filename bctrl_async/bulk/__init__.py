"""The bulk stop: many targets, exactly one outcome for each."""

from bctrl_async.bulk._batch import OnOutcome, StopBatch
from bctrl_async.bulk._duplicates import Remembering

__all__ = ["OnOutcome", "Remembering", "StopBatch"]
