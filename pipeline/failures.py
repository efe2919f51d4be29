"""What ends a command, put into words: one line for the person at the terminal, and never a traceback.

What users, disks, networks and clusters cause is a ValueError or an OSError with a message of its own. Of everything else the
traceback goes into a file, whose path the line names; KVPIPE_DEBUG=1 shows every traceback at once. Knows no commands.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

_DEBUG = "KVPIPE_DEBUG"


def one_line(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 300 else f"{text[:297]}..."


def in_words(error: BaseException) -> str:
    """What to tell the person whose command this exception ended."""
    while isinstance(error, BaseExceptionGroup):  # of asynchronous readers, whose first error says why
        error = error.exceptions[0]
    if os.environ.get(_DEBUG, "") not in ("", "0"):
        return f"{''.join(traceback.format_exception(error))}error: {_reason(error)}"
    return f"error: {_reason(error)}{'' if _is_expected(error) else _where_from(error)}"


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (ValueError, OSError, MemoryError, RecursionError)) or _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Also of a device, for which torch and others have classes and texts of their own."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def _reason(error: BaseException) -> str:
    if isinstance(error, (ValueError, OSError)):
        return _described(error)
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply to be taken in; look at JSON of data, models and settings"
    if _is_out_of_memory(error):
        return (
            f"the memory does not suffice ({one_line(error)}); ask for less at once: smaller batches, fewer workers or layers"
        )
    return one_line(error)


_NEXT_STEPS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free room there, or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "mend its permissions, or choose another place"),
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another place",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}
"""What ends an error of the operating system, whichever file it meets."""


def _described(error: ValueError | OSError) -> str:
    """An error as one message that ends with the next step; those of the operating system say only what is wrong."""
    step = _NEXT_STEPS.get(error.errno or 0) if isinstance(error, OSError) else None
    if step is None or not isinstance(error, OSError):
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {step}, and run the same command again: what is committed or saved is kept"


def _where_from(error: BaseException) -> str:
    """Keep the traceback of what nobody foresaw; the end of a line that says where."""
    ours = type(error).__module__.partition(".")[0] in ("builtins", "kvstore", "pipeline", "training")
    whose = "this is not foreseen and may be a fault of kvpipe" if ours else f"from {type(error).__module__.partition('.')[0]}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="kvpipe-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return f" ({whose}; run it again with {_DEBUG}=1 to see where)"
    return f" ({whose}; {path} says where)"
