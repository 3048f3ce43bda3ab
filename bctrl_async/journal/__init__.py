"""The journal of a bulk stop: a file of outcomes from which an interrupted run can be resumed."""

from bctrl_async.journal._content import JournalContent, read_journal
from bctrl_async.journal._run import Journal

__all__ = ["Journal", "JournalContent", "read_journal"]
