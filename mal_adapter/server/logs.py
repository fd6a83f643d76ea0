"""Logs as lines of JSON."""

import json
import logging
import sys
from datetime import datetime, timezone

__all__ = ["JsonLines", "log_as_json"]


class JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and the record's `fields`.

    Example:
        >>> record = logging.LogRecord("mal_adapter", logging.INFO, "", 0, "two\\nlines", None, None)
        >>> json.loads(JsonLines().format(record))["message"]
        'two\\nlines'
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, in ASCII, whatever an id or a message has in it."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json(level: int = logging.INFO) -> None:
    """Write the logs of this process, and Python's warnings, to stderr as lines of JSON, from now on.

    Mutates the root logger.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # of other libraries
    for name in ("mal_adapter", "uvicorn"):
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
