"""What a Celery worker does with the message of a run that was replaced: nothing, because it is the newer run's message now."""

from __future__ import annotations

from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]  # its stubs lack it
from celery.worker.request import Request
from kombu.transport.virtual import QoS

from .celery import Replaced


class DurableRequest(Request):
    """The request of a ``durable_task``. Celery's own acknowledges whatever ends."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """A redelivered message keeps its delivery tag on Redis: the older run's ack would be the newer run's, and when
        that one's worker dies nobody would run the task again."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Replaced) and not self.acknowledged:
            self.acknowledged = True
            self._leave_to_broker()
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _leave_to_broker(self) -> None:
        """This worker has room for another message, and must not put this one back into the queue when it ends."""
        qos = getattr(self.message.channel, "qos", None)
        if isinstance(qos, QoS):
            # The base class only forgets; the transport's own ack would tell the broker.
            QoS.ack(qos, self.message.delivery_tag)
