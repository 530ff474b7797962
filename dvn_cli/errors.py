"""What can go wrong, with the exit code that each command ends with."""

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator


class DvnError(Exception):
    """It ran and the answer is no: a gate missed, a NaN loss, a full disk. The command exits with 1."""

    exit_code = 1


class InputError(DvnError):
    """It cannot be run as asked: the message says what is wrong and what would be right. Exits with 2."""

    exit_code = 2


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`, a sentence's end, for the choice nearest to `word`; nothing where none is near."""
    word, choices = str(word), list(choices)
    composed = [unicodedata.normalize("NFC", choice) for choice in choices]
    if word not in choices and unicodedata.normalize("NFC", word) in composed:
        return "; there is one that looks the same, of other Unicode characters (NFC or NFD)."
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def shortened(text: str) -> str:
    """Returns a text, of a long one its beginning."""
    return text if len(text) <= 80 else f"{text[:79]}…"


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
"""What torch's allocators say, of which only the one on CUDA has an exception of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory was too small: Python's own, numpy's, or one of torch's devices."""
    own = isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    return own or isinstance(error, MemoryError)


@contextlib.contextmanager
def enough_memory(where: object, remedy: str) -> Iterator[None]:
    """Turns running out of memory into one line.

    Args:
        where: what has too little of it, such as a device.
        remedy: what would be right, in the imperative.

    Raises:
        DvnError: memory was too small.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DvnError(f"{where} has too little memory: {remedy}") from error
