"""From text to tokens: sources, vocabulary, packing and the n-gram models that losses are read against."""
