"""Commands for who works on sotto: each writes a checked-in file anew, or measures. Not part of the distribution."""
