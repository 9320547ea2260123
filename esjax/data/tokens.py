"""The two token ids that all vocabularies have in common."""

UNK = 0
"""Id of characters that are not in the vocabulary."""

STOP = 1
"""Id of the end of a document; after it the state of a model starts anew."""
