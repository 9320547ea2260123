"""The two token ids that every vocabulary shares."""

UNK = 0
"""A character the vocabulary does not hold."""

STOP = 1
"""The end of a document; after it the hidden state starts anew."""
