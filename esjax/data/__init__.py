"""From text to tokens: sources, vocabulary, packing, and n-gram models for comparison."""
