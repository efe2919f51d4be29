"""Errors of the store. One class for each decision a caller can take; all are `KVStoreError`."""


class KVStoreError(ValueError):
    """Anything a user or a disk can do to a store; the message says what is wrong, got, expected, where and what next."""


class StoreNotFoundError(KVStoreError):
    """There is no store at this path: check the path, or extract one."""


class StoreFormatError(KVStoreError):
    """The store's own records are malformed or of another schema version: it cannot be read by this kvpipe."""


class FingerprintMismatchError(KVStoreError):
    """The store holds another signal or other data than asked for: choose another directory or the store's own settings."""


class ShardNotCommittedError(KVStoreError):
    """A sample or shard was asked for that no commit lists: the extraction is not finished."""


class CorruptShardError(KVStoreError):
    """A committed shard is missing, damaged or not the one that was committed: do not train on it."""


class CodecError(KVStoreError):
    """Values cannot be encoded as asked: not finite, or of a shape the codec cannot hold."""


class FidelityError(KVStoreError):
    """The codec changes what is stored by more than was allowed: take a more faithful one, or accept it."""


class LeaseHeldError(KVStoreError):
    """Another process is writing these shards: wait for it, or take others."""


class LeaseLostError(KVStoreError):
    """This process stood still until its claim ran out, and another took over: run the same command again."""


class StoreWriteError(KVStoreError, OSError):
    """The disk or bucket refused: free space or mend permissions, and run the same command again."""
