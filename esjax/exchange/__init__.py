"""What hosts hand in for pairs that they scored, and what becomes of it: values, conclusions, updates as bytes."""
