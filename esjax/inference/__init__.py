"""What a trained model can do: write text, and be scored."""
