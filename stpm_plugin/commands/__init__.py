"""What a person types: score, verify, explain."""
