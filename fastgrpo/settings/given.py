"""What libraries raise at something that a user gave, as one ValueError that names it and says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def given(what: str, fix: str = "") -> Iterator[None]:
    """Around a library's call alone: an error of this program must keep its traceback.

    Args:
        what: the setting and its value, or the file, and what is wrong with it.

    Raises:
        ValueError: the library raised anything but that memory is full.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what}: {one_line(error)} {fix}".rstrip()) from error


def one_line(error: BaseException) -> str:
    """An exception's kind and message; of a ValueError or OSError the message, which says enough."""
    line = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and line:
        return line
    return f"{type(error).__name__}: {line}".rstrip(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or the host."""
    said = ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed")
    is_host = isinstance(error, MemoryError) or any(one in str(error) for one in said)
    return is_host or type(error).__name__ == "OutOfMemoryError"  # torch's
