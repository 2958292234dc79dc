"""What a worker is asked and tells of a request, as it goes over gRPC."""

from typing import Final

from kvtier.engine.sequence import DEFAULT_MAX_TOKENS, Done, FinishReason, Started, Tokens
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import worker_pb2

_REASONS: Final = {
    FinishReason.STOP: worker_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_REASON_LENGTH,
}


def most_tokens(request: worker_pb2.WorkerRequest) -> int:
    """How long its answer may be; 0, which nobody can give, only where it says so itself."""
    return request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS


def to_wire(event: Started | Tokens | Done) -> worker_pb2.WorkerResponse:
    """One message of `Worker.Generate`."""
    match event:
        case Started():
            restored = [
                worker_pb2.TierTokens(tier=TO_WIRE[tier], tokens=tokens)
                for tier, tokens in sorted(event.restored.items())
            ]
            started = worker_pb2.Started(
                prompt_tokens=event.prompt_tokens,
                restored=restored,
                computed_tokens=event.computed_tokens,
                pulled_tokens=event.pulled_tokens,
                queue_s=event.queue_s,
                restore_s=event.restore_s,
                prefill_s=event.prefill_s,
                first_logits=event.first_logits,
            )
            return worker_pb2.WorkerResponse(started=started)
        case Tokens(ids):
            return worker_pb2.WorkerResponse(tokens=worker_pb2.Tokens(ids=ids))
        case Done():
            done = worker_pb2.Done(
                finish_reason=_REASONS[event.finish_reason],
                completion_tokens=event.completion_tokens,
                saved_tokens=event.saved_tokens,
            )
            return worker_pb2.WorkerResponse(done=done)
