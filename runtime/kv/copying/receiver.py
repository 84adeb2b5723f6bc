"""One Copy stream at the holder: messages in, answers out, in order."""

import asyncio
from typing import Final, TypeAlias

import grpc
import grpc.aio

from edgellm.runtime.kv.copying.holder import CopyHolder, Entry, RefusalReason, Refused
from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.transports.base import Incoming, TransportError
from edgellm.runtime.wire import attempt_from_proto

CopyContext: TypeAlias = grpc.aio.ServicerContext[kv_pb2.KvCopyMessage, kv_pb2.KvCopyAck]

_STATUS: Final[dict[RefusalReason, kv_pb2.KvAckStatus.ValueType]] = {
    "stale": kv_pb2.KV_ACK_STATUS_STALE,
    "early": kv_pb2.KV_ACK_STATUS_EARLY,
    "corrupt": kv_pb2.KV_ACK_STATUS_CORRUPT,
    "no capacity": kv_pb2.KV_ACK_STATUS_NO_CAPACITY,
}


async def receive_copies(
    holder: CopyHolder, incoming: Incoming, context: CopyContext, *, idle_timeout_s: float
) -> None:
    """Until the sender half-closes; a stream on which nothing arrives for `idle_timeout_s` is given up."""
    while True:
        try:
            async with asyncio.timeout(idle_timeout_s):
                message = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"silent for {idle_timeout_s} s")
        if not isinstance(message, kv_pb2.KvCopyMessage):
            return
        refused = _install(holder, incoming, message)
        await context.write(kv_pb2.KvCopyAck(refusals=[_to_proto(one) for one in refused]))


def _install(holder: CopyHolder, incoming: Incoming, message: kv_pb2.KvCopyMessage) -> list[Refused]:
    entries = [_entry(rows) for rows in message.entries]
    try:
        payload = incoming.fetch(message)
    except TransportError as error:
        return holder.refuse_all(entries, str(error))
    return holder.install(entries, payload, message.checksum)


def _entry(rows: kv_pb2.KvCopyRows) -> Entry:
    return Entry(
        attempt=attempt_from_proto(rows.attempt),
        layers=range(rows.first_layer, rows.first_layer + rows.num_layers),
        tokens=range(rows.first_token, rows.first_token + rows.num_tokens),
        capacity_tokens=rows.capacity_tokens,
        codec=rows.codec,
        length=rows.length,
    )


def _to_proto(refused: Refused) -> kv_pb2.KvCopyRefusal:
    return kv_pb2.KvCopyRefusal(entry=refused.index, status=_STATUS[refused.reason], message=refused.message)
