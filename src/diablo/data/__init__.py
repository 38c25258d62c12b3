"""Files to rows of prompt and completion, and rows to tokens and batches."""

from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.faults import RowFault
from diablo.data.reading.sources import read_rows
from diablo.data.rows import Row

__all__ = ["EncodedRow", "Row", "RowEncoder", "RowFault", "read_rows"]
