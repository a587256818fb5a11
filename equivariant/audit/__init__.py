"""What a sealed model gives away, measured."""
