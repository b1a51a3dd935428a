"""The exit codes of the command line."""

DONE = 0
AUDIT_FAILED = CHECK_FAILED = 1
BAD_INPUT = 2  # one line on stderr says what was expected and what was given
NOTHING_RAN = 3  # of what should have been checked
INTERNAL_ERROR = 70  # a bug, with its traceback
INTERRUPTED = 130  # by Ctrl-C
READER_GONE = 141  # stdout was closed by its reader
