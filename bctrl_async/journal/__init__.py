"""The journal of a bulk stop: a file of outcomes from which an interrupted run can be resumed.

The journals of several runs, such as those of shards, can be read as one.
"""

from bctrl_async.journal._content import JournalContent, read_journal
from bctrl_async.journal._merge import (
    JournalOutcome,
    MergedJournals,
    merge_journals,
    read_journals,
)
from bctrl_async.journal._run import Journal, JournalInUseError

__all__ = [
    "Journal",
    "JournalContent",
    "JournalInUseError",
    "JournalOutcome",
    "MergedJournals",
    "merge_journals",
    "read_journal",
    "read_journals",
]
