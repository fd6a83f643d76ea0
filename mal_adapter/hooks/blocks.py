"""Which `with memory.session(...)` block the running code is in, for threads, tasks and contexts of any kind."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from mal_adapter.hooks.session import Session

__all__ = ["BLOCKS", "Block", "current_block", "entered"]


@dataclasses.dataclass(eq=False)
class Block:
    """One `with memory.session(...)` or `with memory.disabled()` block.

    Attributes:
        session: The session of the block; None for a disabled memory.
        outer: The block of the same memory around it.
        left: Whether it has been left. A task that began inside has a copy of its context, and may run longer.
        left_elsewhere: Whether it was left in another context than it was entered in. The context that entered it
            then keeps it, although nothing there is inside.
    """

    session: Session | None
    outer: "Block | None"
    left: bool = False
    left_elsewhere: bool = False


# One variable for all memories: a ContextVar per memory would never be freed. The mapping, from a memory's key to its
# innermost block, is replaced and never changed, so that a task's copy of the context keeps what it saw.
BLOCKS: ContextVar[Mapping[object, Block]] = ContextVar("mal_adapter_blocks", default={})  # noqa: B039


def current_block(memory: object) -> Block | None:
    """The innermost block of a memory in this context; None outside of any.

    A session's block that was left is still returned, with `left` set, in two places where code may expect the session
    and must not run without it unnoticed: in contexts that were copied inside of the block, such as a task's; and after
    a block in which no forward ran, since what was made there may run now, such as a generator. A forward that runs
    while its block is left in another context keeps it until it ends.
    """
    block = BLOCKS.get().get(memory)
    while block is not None and block.left and _is_over(block):
        block = block.outer
    return block


def _is_over(block: Block) -> bool:
    """Whether nothing in this context can belong to a block that was left. A forward that still runs can."""
    session = block.session
    return session is None or (block.left_elsewhere and session.forward is None)


@contextmanager
def entered(memory: object, session: Session | None) -> Iterator[None]:
    """Within this block, `session` is the one of `memory` in this context; None disables the memory.

    It may be left in any context or thread: web frameworks enter and leave a dependency in two of them, and a generator
    that nobody finishes is closed wherever it is collected.
    """
    before = BLOCKS.get()
    block = Block(session, before.get(memory))
    token = BLOCKS.set({**before, memory: block})
    finished = False
    try:
        yield
        finished = True
    finally:
        block.left = True
        blocks = dict(BLOCKS.get())
        try:
            BLOCKS.reset(token)
        except ValueError:  # of another context, which can't be reached from here
            block.left_elsewhere = True
        else:
            # Not what reset() brings back: blocks of generators may be left in another order than they were entered.
            innermost = blocks.pop(memory, None)
            while innermost is not None and innermost.left:
                innermost = innermost.outer
            if innermost is None and finished and session is not None and not session.used:
                block.outer = None  # also left; a chain of unused blocks would keep all their sessions
                innermost = block
            BLOCKS.set(blocks if innermost is None else {**blocks, memory: innermost})
