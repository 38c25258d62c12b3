"""Files to rows of prompt and completion, and rows to tokens and batches."""

from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.faults import RowFault
from diablo.data.rows import Row
from diablo.data.sources import read_rows

__all__ = ["EncodedRow", "Row", "RowEncoder", "RowFault", "read_rows"]
