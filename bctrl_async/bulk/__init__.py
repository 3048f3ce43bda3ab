"""The bulk stop: many targets, exactly one outcome for each."""

from bctrl_async.bulk._batch import OnOutcome, StopBatch

__all__ = ["OnOutcome", "StopBatch"]
