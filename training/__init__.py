"""Store to student: reads a store beside its tokens and trains a student on both, with no teacher in memory."""
