"""Which strategy to use for a task, learned from recorded performance.

Pure: numpy and scikit-learn, arrays in, arrays out; no clock, no files, no network. Importing this package loads
neither: its modules do, so that only who chooses pays for it.
"""
