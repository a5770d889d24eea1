"""Looking into implicit layers while they run."""

from ._monitor import Monitor as Monitor
from ._monitor import Record as Record
from ._monitor import monitor as monitor
from ._monitor import record as record
