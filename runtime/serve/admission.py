"""How many answers may be under way, and who is turned away."""

from __future__ import annotations

from runtime.serve.error import SERVER, ApiError

OPEN_FOR_EACH = 8  # responses that clients may still be reading, per answer that may be under way
RETRY_AFTER_S = 1


class Admission:
    """Counts answers that run or wait, and responses that are not yet read to their end, on the event loop alone.

    An answer that is complete makes room for others, however slowly its client reads it.

    Args:
        rows: how many answers run together.
        max_queue: how many more may wait.
    """

    def __init__(self, rows: int, max_queue: int) -> None:
        self.most = rows + max_queue
        self.answers = self.responses = 0
        self.is_draining = False

    def enter(self, answers: int) -> None:
        """Counts a request's answers and its response.

        Raises:
            ApiError: 400 for more answers than there is ever room for, 429 for more than there is room for now, 503
                while shutting down.
        """
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", SERVER, code="shutting_down", headers=retry)
        if answers > self.most:
            raise ApiError(
                400, f"a request may have at most {self.most} answers (prompts times n) here, got {answers}", param="n"
            )
        if self.answers + answers > self.most or self.responses >= OPEN_FOR_EACH * self.most:
            message = f"the queue is full: of {self.most} answers that may be under way, {self.answers} are"
            raise ApiError(429, message, "rate_limit_error", code="queue_full", headers=retry)
        self.answers += answers
        self.responses += 1

    def answered(self, answers: int) -> None:
        """A request's answers are complete, or have been given up."""
        self.answers -= answers

    def leave(self) -> None:
        """A response has been read, or its reader has gone."""
        self.responses -= 1
