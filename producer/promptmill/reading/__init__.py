"""Reading a job's events: the log, then the channel, with nothing missed and nothing twice."""

from promptmill.reading.frame import Frame
from promptmill.reading.hub import Hub
from promptmill.reading.reader import Reader

__all__ = ["Frame", "Hub", "Reader"]
