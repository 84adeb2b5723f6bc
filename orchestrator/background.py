"""Tasks that run beside a block of code and are owned by it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines while the block runs; cancel and await them at its end.

    If one of them fails, the block is cancelled. A single error, or the first of several of one type, comes out as
    itself, not in a group, so that expected errors can be caught by their type.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as errors:
        if len({type(error) for error in errors.exceptions}) == 1:
            raise errors.exceptions[0] from None
        raise
